"""What a config asks for that this project or this machine does not have."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from ulysses_core.config import RunConfig
from ulysses_monitor.common.errors import InputError

__all__ = ["check_attention", "check_modality", "check_packages"]

_OTHER_MODALITIES = re.compile(
    "(vision|audio|image|video|speech|thinker|talker|perceiver|projector)_?(config|tower)?$"
)
_TEMPLATES = re.compile(
    r"(^|_)(vl|omni|audio|video|vision|llava|pixtral|paligemma|mllama)(_|$|\d)"
    r"|minicpm_[vo]|glm4_5v|glm4v|mllama|llava|mossvl|internvl|intern_vl|vl_"
)
"""Names of LLaMA-Factory's templates for images, video and audio."""


def check_modality(config: RunConfig) -> None:
    """Refuses models and templates for images, video or audio.

    Raises:
        InputError: the config names one.
    """
    reason = "images, video and audio are not trained on; use a text model"
    architecture = config.model.architecture
    name = config.model.model_name_or_path
    if architecture is None:
        try:
            path = Path(name or "") / "config.json"
            architecture = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            architecture = {}  # of the hub, or damaged: loading it gives an error
    parts = [key for key, value in architecture.items() if isinstance(value, dict) and value]
    found = next((key for key in parts if _OTHER_MODALITIES.match(key)), None)
    if found is not None:
        raise InputError(f"model {name or 'model_config'}: it has a {found}; {reason}")
    template = config.data.template
    if template is not None and _TEMPLATES.search(template):
        raise InputError(f"template is {template!r}; {reason}")


def check_packages(config: RunConfig) -> None:
    """Checks that the packages are here that trackers and the optimizer need.

    Raises:
        InputError: one is missing.
    """
    _check_trackers(config)
    _check_optimizer(config)


def check_attention(config: RunConfig) -> None:
    """Checks that the package of the attention is here.

    Raises:
        InputError: it is missing.
    """
    if config.model.flash_attn == "fa2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "flash_attn is fa2, which needs the package flash-attn and a GPU; install it, or set "
            "flash_attn: auto"
        )


def _check_trackers(config: RunConfig) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    names = config.training.get("report_to") or []
    for name in [names] if isinstance(names, str) else names:
        if name in ("none", "all", *get_available_reporting_integrations()):
            continue
        if name in INTEGRATION_TO_CALLBACK:
            raise InputError(
                f"report_to is {name}, whose package is not installed; install it, or set "
                "report_to: none: the monitor records the run"
            )
        allowed = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise InputError(f"report_to is {name!r}; allowed: none, all, {allowed}")


def _check_optimizer(config: RunConfig) -> None:
    """Asks transformers for the optimizer's class, which imports its package."""
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

    if "optim" not in config.training or "optimizer" in (config.deepspeed or {}):
        return
    keys = ("optim", "optim_args", "optim_target_modules")
    settings = {key: config.training[key] for key in keys if key in config.training}
    try:
        args = TrainingArguments(**settings, report_to="none", use_cpu=True)
        with torch.device("meta"):
            model = PreTrainedModel(PreTrainedConfig())
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise InputError(f"optim is {config.training['optim']}: {line}") from error

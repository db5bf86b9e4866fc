"""Loads the model that answers, with its adapters merged."""

from __future__ import annotations

import os
from typing import Any

from ulysses_core.generate.config import GenerateConfig
from ulysses_core.trainers.build import ATTENTION
from ulysses_monitor.common.errors import InputError

__all__ = ["load_model"]


def load_model(config: GenerateConfig) -> Any:
    """Loads the model on this process's device.

    Raises:
        InputError: the model or an adapter cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = config.infer_dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=ATTENTION[config.flash_attn],
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        )
    except (OSError, ValueError, ImportError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise InputError(f"model {config.model_name_or_path}: cannot load it: {line}") from error
    for adapter in config.adapter_name_or_path:
        model = _merge(model, adapter)
    return model.to(_device()).eval()


def _merge(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise InputError(f"adapter {adapter}: cannot load it: {line}") from error


def _device() -> Any:
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    return torch.device(kind.type if kind else "cpu", int(os.environ.get("LOCAL_RANK", "0")))

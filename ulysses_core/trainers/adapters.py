"""Adapters of a model: made, loaded, merged; and what freeze and full fine-tuning train instead."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from ulysses_core.config import FinetuningConfig, ModelConfig, RunConfig
from ulysses_core.lora.calibration_rows import TokenRows
from ulysses_core.lora.inits import needs_rows, needs_weights
from ulysses_core.lora.saved import convert_adapter, find_initial, read_adapter_config
from ulysses_core.trainers.freezing import count_layers, freeze_layers, trained_layers
from ulysses_monitor.common.errors import InputError

__all__ = ["add_adapters", "find_adapters", "first_line", "merge_adapter", "rehearse_adapters"]

logger = logging.getLogger(__name__)

_PEFT_TASKS = {"causal": "CAUSAL_LM", "score": "SEQ_CLS", "value": "CAUSAL_LM"}


def add_adapters(
    model: Any, config: RunConfig, task: str, rows: TokenRows = (), device: Any = None
) -> Any:
    """Makes `model` train what the config says.

    Full fine-tuning trains all of it, `freeze` some layers. Otherwise it gets adapters: new ones,
    or the last of `adapter_name_or_path`, after those before it are merged into the base. For task
    `value` it also gets a value head, which is trained in full.

    Args:
        model: the base, with its weights.
        config: the run's.
        task: the head of the model: `causal`, `score` or `value`.
        rows: rows to train on, if the initialisation looks at them.
        device: where the model then runs on them.

    Raises:
        InputError: a target matches no module, or an adapter cannot be loaded.
    """
    finetuning = config.finetuning
    if finetuning.finetuning_type == "freeze":
        freeze_layers(model, finetuning)
    if not finetuning.has_adapters:
        return _add_head(model, task)
    folders = find_adapters(config.model)
    last = None if finetuning.create_new_adapter or not folders else folders.pop()
    for folder in folders:
        model = merge_adapter(model, folder)
    if last is not None:
        return _load(model, last, is_trainable=True)
    seed = config.training.get("seed", 42)
    adapted = _create(_add_head(model, task), finetuning, task, seed)
    if finetuning.finetuning_type == "lora" and needs_rows(finetuning.init):
        from ulysses_core.lora import init_lora

        init_lora(adapted, finetuning.init, seed=seed, rows=rows, device=device)
    return adapted


def _add_head(model: Any, task: str) -> Any:
    if task == "value":
        from ulysses_core.trainers.ppo.value_head import add_value_head

        add_value_head(model)
    return model


def rehearse_adapters(model: Any, config: RunConfig, task: str) -> Any:
    """Does what `add_adapters` does on a model without weights, and checks shapes.

    Raises:
        InputError: as `add_adapters`, or a rank that an initialisation cannot have.
    """
    from peft import PeftConfig, get_peft_model

    from ulysses_core.lora.layers import check_rank

    finetuning = config.finetuning
    for folder in find_adapters(config.model):
        read_adapter_config(folder)
        try:
            held = PeftConfig.from_pretrained(str(folder))
            if isinstance(getattr(held, "init_lora_weights", True), str):
                held.init_lora_weights = True
            get_peft_model(model, held).unload()
        except (ValueError, TypeError) as error:
            raise InputError(f"adapter {folder}: {first_line(error)}") from error
    update: dict[str, Any] = {"lora_init": "default", "pissa_init": False}
    plain = finetuning.model_copy(update=update | {"lora_init_correct_base": True})
    empty = config.model.model_copy(update={"adapter_name_or_path": []})
    model = add_adapters(model, replace(config, finetuning=plain, model=empty), task)
    if finetuning.finetuning_type == "lora" and needs_weights(finetuning.init):
        check_rank(model, finetuning.init)
    return model


def find_adapters(config: ModelConfig) -> list[Path]:
    """Returns the folders of `adapter_name_or_path`, downloaded where they are of the hub.

    Raises:
        InputError: there is no such folder.
    """
    return [_find(name, config) for name in config.adapter_name_or_path]


def _find(name: str, config: ModelConfig) -> Path:
    folder = Path(name)
    if not folder.is_dir() and name.count("/") == 1 and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=config.model_revision,
                    cache_dir=config.cache_dir,
                    token=config.hf_hub_token,
                )
            )
        except (OSError, ValueError) as error:
            raise InputError(f"adapter {name}: cannot load it: {first_line(error)}") from error
    if config.adapter_folder is not None:
        folder /= config.adapter_folder
    if not folder.is_dir():
        raise InputError(
            f"adapter_name_or_path is {name!r}, but there is no folder {folder}; expected a folder "
            "with an adapter"
        )
    return folder


def _load(model: Any, folder: Path, *, is_trainable: bool) -> Any:
    """Loads an adapter that a folder has onto the original base."""
    from peft import PeftModel

    initial = find_initial(folder)
    try:
        if initial is None:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
        with tempfile.TemporaryDirectory() as place:
            convert_adapter(folder, initial, Path(place))
            return PeftModel.from_pretrained(model, place, is_trainable=is_trainable)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise InputError(f"adapter {folder}: cannot load it: {first_line(error)}") from error


def merge_adapter(model: Any, folder: Path) -> Any:
    """Returns `model` with an adapter merged into its weights.

    Raises:
        InputError: the adapter cannot be loaded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import gather_params_ctx

    adapted = _load(model, folder, is_trainable=False)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            with gather_params_ctx(module.get_base_layer().parameters()):
                module.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all is merged already
        merged = adapted.merge_and_unload()
    logger.info("merged adapter %s", folder)
    return merged


def _create(model: Any, config: FinetuningConfig, task: str, seed: int) -> Any:
    from peft import get_peft_model

    from ulysses_core.lora.init import init_orthogonal_small

    is_lora = config.finetuning_type == "lora"
    settings = _lora_config(model, config, task) if is_lora else _oft_config(config, task)
    key = "lora_target" if is_lora else "oft_target"
    try:
        adapted = get_peft_model(model, settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"{key} is {getattr(config, key)!r}: {first_line(error)}") from error
    if is_lora and config.init == "orthogonal_small":
        correct = config.lora_init_correct_base
        init_orthogonal_small(adapted, adapter="default", correct_base=correct, seed=seed)
    if is_lora and config.changes_base:
        # TRL copies this config for its reference adapter, which must not change the base again.
        settings.init_lora_weights = True
    return adapted


def _lora_config(model: Any, config: FinetuningConfig, task: str) -> Any:
    from peft import LoraConfig

    is_ours = config.init in ("default", "orthogonal_small") or needs_rows(config.init)
    init: Any = True if is_ours else config.init  # what is not PEFT's happens afterwards
    return LoraConfig(
        task_type=_PEFT_TASKS[task],
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=_inserted_modules(model, config)
        if config.use_llama_pro
        else _targets(config.lora_target),
        modules_to_save=_saved_modules(config, task),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=init,
    )


def _inserted_modules(model: Any, config: FinetuningConfig) -> list[str]:
    """Returns the full names of the targets in the layers that LLaMA Pro inserted."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = trained_layers(count_layers(model), config)
    in_layer = re.compile(rf"\.({'|'.join(map(str, layers))})\.")
    targets = None if config.lora_target == "all" else _split_names(config.lora_target)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and in_layer.search(name)
        and (targets is None or name.split(".")[-1] in targets)
    ]


def _oft_config(config: FinetuningConfig, task: str) -> Any:
    from peft import OFTConfig

    return OFTConfig(
        task_type=_PEFT_TASKS[task],
        r=config.oft_rank,
        oft_block_size=config.oft_block_size,
        module_dropout=config.module_dropout,
        target_modules=_targets(config.oft_target),
        modules_to_save=_saved_modules(config, task),
    )


def _saved_modules(config: FinetuningConfig, task: str) -> list[str] | None:
    names = _split_names(config.additional_target) or []
    if task == "value":
        from ulysses_core.trainers.ppo.value_head import NAME

        names.append(NAME)
    return names or None


def _targets(text: str) -> str | list[str] | None:
    return "all-linear" if text == "all" else _split_names(text)


def _split_names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, and the second if that only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])

"""Saves a model with its adapters merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulysses_core.config import RunConfig
from ulysses_monitor.common.errors import InputError

__all__ = ["export_model"]

_DTYPES = {"float16", "bfloat16", "float32"}


def export_model(config: RunConfig) -> Path:
    """Merges `adapter_name_or_path` into the model and saves it with its tokenizer.

    The weights keep the dtype in which they are stored, unless `infer_dtype` names one. Nothing
    leaves this machine.

    Args:
        config: with `export_dir`.

    Returns:
        The folder.

    Raises:
        InputError: the folder is taken, or the model or an adapter cannot be loaded.
    """
    import torch

    from ulysses_core.lora.saved import read_adapter_config
    from ulysses_core.trainers.adapters import find_adapters, merge_adapter
    from ulysses_core.trainers.build import build_base_model, build_tokenizer
    from ulysses_core.trainers.stage import find_stage

    folder = _check_folder(config)
    folders = find_adapters(config.model)
    for adapter in folders:
        read_adapter_config(adapter)  # before the base is loaded
    tokenizer = build_tokenizer(config.model)
    device = torch.device("cpu")
    if config.export.export_device == "auto" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    name = config.export.infer_dtype
    dtype: Any = getattr(torch, name) if name in _DTYPES else "auto"
    task = find_stage(config.finetuning.stage).task
    model = build_base_model(config.model, tokenizer, dtype, task, device).to(device)
    for adapter in folders:
        model = merge_adapter(model, adapter)
    model.save_pretrained(str(folder), max_shard_size=f"{config.export.export_size}GB")
    tokenizer.save_pretrained(str(folder))
    return folder


def _check_folder(config: RunConfig) -> Path:
    folder = config.export.export_dir
    assert folder is not None  # noqa: S101 - the caller checked it
    if folder.is_file():
        raise InputError(f"export_dir is {str(folder)!r}, which is a file; expected a folder")
    sources = [config.model.model_name_or_path or "", *config.model.adapter_name_or_path]
    if any(Path(source).resolve() == folder.resolve() for source in sources if source):
        raise InputError(
            f"export_dir is {str(folder)!r}, from which it would be read; choose another folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not config.settings.overwrite_output_dir:
        raise InputError(
            f"export_dir is {str(folder)!r}, which is not empty; choose another folder, or set "
            "overwrite_output_dir: true"
        )
    return folder

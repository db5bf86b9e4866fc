"""Bases in 4 or 8 bits: quantised while they are loaded, or already on disk."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from ulysses_core.config import ModelConfig, RunConfig
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["check_quantised", "quantise"]


def quantise(config: ModelConfig, dtype: Any, device: torch.device) -> dict[str, Any]:
    """Returns the arguments with which transformers quantises a model while it loads it.

    Args:
        config: with `quantization_bit`; without it nothing is returned.
        dtype: of the computation.
        device: where the whole model goes.
    """
    if config.quantization_bit is None:
        return {}
    from transformers import BitsAndBytesConfig

    if config.quantization_bit == 8:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=config.quantization_type,
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_quant_storage=dtype,  # of the parameters' own type, so that FSDP can cut them
        )
    return {"quantization_config": settings, "device_map": {"": device}}


def check_quantised(config: RunConfig, architecture: Any) -> None:
    """Checks whether this machine can train on a quantised base, if the config has one.

    Args:
        config: the run's.
        architecture: transformers' config of the model.

    Raises:
        InputError: a package is missing, or the config does not suit a quantised base.
    """
    bits = config.model.quantization_bit
    stored = getattr(architecture, "quantization_config", None)
    if bits is None and stored is None:
        return
    what = f"quantization_bit is {bits}" if bits else f"model {config.model.model_name_or_path}"
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{what}, which needs bitsandbytes; install it, or remove the key")
    if stored is not None:
        _check_packages(what, stored)
    finetuning = config.finetuning
    if not finetuning.has_adapters:
        raise InputError(
            f"{what}: a quantised base is trained with adapters; finetuning_type is "
            f"{finetuning.finetuning_type}, so set lora or oft"
        )
    if finetuning.finetuning_type == "lora" and finetuning.changes_base:
        raise InputError(
            f"{what}: lora_init {finetuning.init} changes the base's weights, which are quantised; "
            "use lora_init: default"
        )
    if len(config.model.adapter_name_or_path) > int(not finetuning.create_new_adapter):
        raise InputError(
            f"{what}: adapters are not merged into a quantised base; merge them with ulysses "
            "export first"
        )
    zero = (config.deepspeed or {}).get("zero_optimization", {})
    if zero.get("stage") == 3:
        raise InputError(f"{what}: ZeRO-3 does not cut quantised weights; use zero2 or fsdp")


def _check_packages(what: str, stored: Any) -> None:
    from transformers.quantizers import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(
            device_map=None, weights_only=True
        )
    except (ImportError, ValueError, RuntimeError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise InputError(f"{what}: it is quantised, and cannot be loaded here: {line}") from error

"""DeepSpeed settings: a shipped name, a JSON file, or a mapping in the config."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["SHIPPED", "load_deepspeed"]

SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")

_LLAMA_FACTORYS = {
    "ds_z0_config.json": "zero0",
    "ds_z2_config.json": "zero2",
    "ds_z2_offload_config.json": "zero2-offload",
    "ds_z3_config.json": "zero3",
    "ds_z3_offload_config.json": "zero3-offload",
}
"""The files in LLaMA-Factory's examples/deepspeed, and the shipped settings that match them."""

_REFUSED = {
    "ds_z2_autotp_config.json": "it cuts layers (tensor parallelism), which is not supported; "
    "sequence_parallel_size cuts rows",
    "ds_z3_fp8_config.json": "it is for FP8, which is not supported; use zero3-offload",
}


def load_deepspeed(
    value: str | dict[str, Any] | None, where: str
) -> tuple[dict[str, Any] | None, int | None]:
    """Resolves the config's ``deepspeed`` key.

    Returns:
        The settings without ``sequence_parallel_size``, and that size if they contain one.
        DeepSpeed must not see it: it would average gradients over sequence groups of its own.

    Raises:
        InputError: no such name or file, or the file is not a JSON object.
    """
    if value is None:
        return None, None
    settings = dict(value) if isinstance(value, dict) else _read(value, where)
    size = settings.pop("sequence_parallel_size", None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise InputError(
            f"{where}: deepspeed.sequence_parallel_size is {size!r}; "
            "expected an integer of 1 or more"
        )
    return settings, size


def _read(value: str, where: str) -> dict[str, Any]:
    if not Path(value).is_file():
        value = _LLAMA_FACTORYS.get(Path(value).name, value)
    if reason := _REFUSED.get(Path(value).name):
        raise InputError(f"{where}: deepspeed is {value!r}; {reason}")
    if value in SHIPPED:
        text = (
            resources.files("ulysses_core.config").joinpath(f"deepspeed/{value}.json").read_text()
        )
    elif Path(value).is_file():
        text = Path(value).read_text(encoding="utf-8")
    else:
        hint = nearest(value, SHIPPED)
        raise InputError(
            f"{where}: deepspeed is {value!r}{hint}; expected the path of a JSON file, or one of "
            f"{', '.join(SHIPPED)}"
        )
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{value}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{value}: not a JSON object; expected DeepSpeed settings in braces")
    return settings

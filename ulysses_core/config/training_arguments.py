"""The keys of `transformers.TrainingArguments`: which there are, and whether values fit them."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ulysses_monitor.common.errors import InputError

__all__ = ["check_training_arguments", "training_keys"]

_OWN = {"output_dir", "deepspeed", "use_cpu", "local_rank", "parallelism_config", "do_train"}
"""Fields that this project sets itself."""

_RENAMED = {"warmup_ratio": "warmup_steps"}
"""Older names that LLaMA-Factory's files use; a warm-up below 1 is a share of all steps."""


@cache
def _hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = (f.name for f in dataclasses.fields(TrainingArguments) if f.init)
    return {name: hints[name] for name in names if name not in _OWN}


def training_keys() -> list[str]:
    """Every key that goes to `TrainingArguments`."""
    return [*_hints(), *_RENAMED]


def check_training_arguments(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Converts values to the types that `TrainingArguments` declares (YAML reads 1e-4 as text).

    Raises:
        InputError: a value does not fit.
    """
    return {
        _RENAMED.get(key, key): _convert(key, _hints()[_RENAMED.get(key, key)], value, where)
        for key, value in values.items()
    }


def _convert(key: str, hint: Any, value: Any, where: str) -> Any:
    allowed = _enum_values(hint)
    if allowed and isinstance(value, str) and value not in allowed:
        raise InputError(f"{where}: {key}: got {value!r}; allowed are {', '.join(allowed)}")
    if allowed and value is False:
        return "no"  # YAML reads an unquoted `no` as false
    if key == "resume_from_checkpoint":
        hint = bool | str | None  # true means the newest checkpoint in output_dir
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        text = error.errors()[0]["msg"]
        raise InputError(f"{where}: {key}: {text}, got {value!r}") from None


def _enum_values(hint: Any) -> list[str]:
    enums = [t for t in typing.get_args(hint) if isinstance(t, type) and issubclass(t, Enum)]
    return [str(member.value) for enum in enums for member in enum]

"""Lists the keys of `transformers.TrainingArguments` and validates their values."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ulysses_core.config.ranges import check_ranges
from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.validation import describe_problem

__all__ = ["check_training_arguments", "training_keys"]

_SET_HERE = {
    "output_dir",
    "deepspeed",
    "use_cpu",
    "local_rank",
    "parallelism_config",
    "do_train",
    "do_eval",
    "do_predict",
}
"""Fields that this project sets itself."""

_RENAMED = {"warmup_ratio": "warmup_steps"}
"""Older names that LLaMA-Factory's files use. A warm-up below 1 is a fraction of all steps."""


@cache
def _type_hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = (f.name for f in dataclasses.fields(TrainingArguments) if f.init)
    return {name: hints[name] for name in names if name not in _SET_HERE}


def training_keys() -> list[str]:
    """Returns every key that is passed on to `TrainingArguments`."""
    return [*_type_hints(), *_RENAMED]


def check_training_arguments(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Converts values to the types that `TrainingArguments` declares (YAML reads 1e-4 as text).

    Raises:
        InputError: a value has the wrong type, or is out of range.
    """
    converted = {
        key: _convert(key, _type_hints()[_RENAMED.get(key, key)], value, where)
        for key, value in values.items()
    }
    check_ranges(converted, where)
    return {_RENAMED.get(key, key): value for key, value in converted.items()}


def _convert(key: str, annotation: Any, value: Any, where: str) -> Any:
    allowed = _enum_values(annotation)
    if allowed and isinstance(value, str) and value not in allowed:
        hint = nearest(value, allowed)
        raise InputError(f"{where}: {key} is {value!r}{hint}; allowed: {', '.join(allowed)}")
    if allowed and value is False:
        return "no"  # YAML reads an unquoted `no` as false
    if key == "resume_from_checkpoint":
        annotation = bool | str | None  # true means the newest checkpoint in output_dir
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_problem(error, key=key)}") from None


def _enum_values(annotation: Any) -> list[str]:
    enums = [t for t in typing.get_args(annotation) if isinstance(t, type) and issubclass(t, Enum)]
    return [str(member.value) for enum in enums for member in enum]

"""Turns pydantic's errors into the project's one-line form."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.expectations import (
    describe_expected,
    explicit_expectation,
    item_hint,
)
from ulysses_monitor.common.masking import mask_secrets

__all__ = ["describe_problem", "validate"]

_Model = TypeVar("_Model", bound=BaseModel)

_TYPES = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "model": "a mapping",
    "none": "nothing",
    "path": "a path",
    "string": "text",
}
"""How a message names a type, by the first word of pydantic's error type."""

_LIMITS = {
    "greater_than": ("gt", "a number above {:g}"),
    "greater_than_equal": ("ge", "a number of {:g} or more"),
    "less_than": ("lt", "a number below {:g}"),
    "less_than_equal": ("le", "a number of {:g} or less"),
}


def validate(model: type[_Model], values: Mapping[str, Any], where: str) -> _Model:
    """Returns `values` as a checked `model`.

    Raises:
        InputError: a key or a value is wrong; the message begins with `where`.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{where}: {describe_problem(error, model)}") from None


def describe_problem(
    error: ValidationError, model: type[BaseModel] | None = None, *, key: str = ""
) -> str:
    """Returns the first problem as `<key> is <value>; expected <what>`, secrets masked.

    Args:
        error: what pydantic raised.
        model: the model that was validated, which gives the names of its keys; None for a type.
        key: the key that holds the validated value, where it has one.
    """
    problems = error.errors()
    first = problems[0]
    path = _path(model, first["loc"])
    name = ".".join(filter(None, (key, *path)))
    if first["type"] == "extra_forbidden":
        return _unknown_key(model, first["loc"])
    if first["type"] == "missing":
        return f"{name} is missing; set it"
    declared = _describe_annotation(model, path, first["type"])
    if first["type"] == "value_error" and declared is None:
        text = first["msg"].removeprefix("Value error, ")
        return f"{name}: {text}" if name else text
    # A value that may have one of several types gives an error for each of them.
    same_value = [each for each in problems if _path(model, each["loc"]) == path]
    value = mask_secrets({name: first["input"]})[name]
    if len(same_value) == 1 and first["type"] in ("literal_error", "enum"):
        choices = first["ctx"]["expected"]  # 'a', 'b' or 'c', or numbers without quotes
        allowed = re.findall(r"'([^']*)'", choices) or re.findall(r"\d+", choices)
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        return f"{name} is {value!r}{hint}; allowed: {', '.join(allowed)}"
    expected = declared or " or ".join(dict.fromkeys(map(_describe_expected, same_value)))
    return f"{name} is {value!r}; expected {expected}"


def _describe_annotation(
    model: type[BaseModel] | None, path: tuple[str, ...], kind: str
) -> str | None:
    """Returns what the setting at `path` takes; None if its annotation does not explain the error.

    Args:
        model: the model that was validated.
        path: keys of the setting.
        kind: pydantic's type of the error.
    """
    hint: Any = model
    notes: list[Any] = []
    for part in path:
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            field = _fields(hint).get(part)
            hint, notes = (field.annotation, field.metadata) if field else (None, [])
        else:
            hint, notes = item_hint(hint), []
    if not path or hint is None:
        return None
    is_explained = kind in _LIMITS or kind.endswith(("_type", "_parsing", "too_short"))
    return describe_expected(hint, notes) if is_explained else explicit_expectation(hint, notes)


def _describe_expected(problem: Any) -> str:
    kind = problem["type"]
    if kind in _LIMITS:
        limit, text = _LIMITS[kind]
        return text.format(problem["ctx"][limit])
    name = _TYPES.get(kind.split("_")[0])
    return name or problem["msg"].removeprefix("Input should be ")


def _unknown_key(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> str:
    owner = model
    for part in loc[:-1]:
        owner = _nested(owner, part)
    known = _fields(owner) if owner is not None else ()
    name = ".".join(map(str, loc))
    allowed = f"; allowed: {', '.join(known)}" if known else ""
    return f"unknown key {name!r}{nearest(str(loc[-1]), known)}{allowed}"


def _path(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Returns `loc` without pydantic's names for the types of a union, which end it."""
    path: list[str] = []
    for part in loc:
        is_key = model is not None and part in _fields(model)
        if not is_key and not isinstance(part, int):
            break
        path.append(str(part))
        model = _nested(model, part)
    return tuple(path)


def _fields(model: type[BaseModel]) -> Mapping[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _nested(model: type[BaseModel] | None, key: int | str) -> type[BaseModel] | None:
    field = _fields(model).get(str(key)) if model is not None else None
    if field is None:
        return None
    types = (field.annotation, *typing.get_args(field.annotation))
    return next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)

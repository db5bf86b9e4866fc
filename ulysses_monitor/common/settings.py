"""Settings checked by pydantic against the annotations beside them; an error is one line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, ParamSpec, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    create_model,
)

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.validation import describe_problem

__all__ = [
    "MetricName",
    "Text",
    "Texts",
    "check_fields",
    "check_settings",
    "checked_arguments",
    "list_as_tuple",
    "read_numbers",
]

P = ParamSpec("P")


def list_as_tuple(value: Any) -> Any:
    """Converts a list, as YAML has it, to a tuple; returns other values as they are."""
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, StringConstraints(min_length=1)]
"""A text that is not empty."""

Texts = Annotated[tuple[Text, ...], BeforeValidator(list_as_tuple), Field(min_length=1)]
"""Texts, at least one; a list becomes a tuple."""

MetricName = Annotated[
    str,
    StringConstraints(pattern=r"^[^*?]+$"),
    Expected("the name of one metric, such as grad/norm/total"),
]
"""The name of one metric; a pattern is not one."""


def check_settings(where: str, owner: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Checks values against the annotations of a class's constructor, or of a function.

    Nothing is coerced: a bool is not a number, "5" is not a number, 5.0 is not an integer.

    Args:
        where: whose settings they are, such as ``policy zclip``.
        owner: a dataclass, another class or a function.
        values: some or all of its settings, by name.

    Returns:
        The values by name, as the types that are declared.

    Raises:
        InputError: a value is not what its setting takes.
    """
    model = _model(owner)
    try:
        checked = model.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{where}: {describe_problem(error, model)}") from None
    return {name: getattr(checked, name) for name in values}


def check_fields(where: str, instance: Any) -> None:
    """Checks a dataclass's fields, for its ``__post_init__``; see `check_settings`.

    Raises:
        InputError: a value is not what its field takes.
    """
    given = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}
    for name, value in check_settings(where, type(instance), given).items():
        object.__setattr__(instance, name, value)  # the dataclass may be frozen


def checked_arguments(where: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates a constructor so that its arguments are checked; see `check_settings`."""

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(init)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            given = inspect.signature(init).bind(*args, **kwargs).arguments
            own, *values = given.items()
            init(own[1], **check_settings(where, init, dict(values)))

        return checked

    return decorate


def read_numbers(owner: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts texts to numbers where `owner` declares a float: YAML reads 1e-3 as a text."""
    fields = _model(owner).model_fields
    return {name: _number(value, fields.get(name)) for name, value in values.items()}


def _number(value: Any, field: Any) -> Any:
    if isinstance(value, str) and field is not None and float in _alternatives(field.annotation):
        with suppress(ValueError):
            return float(value)
    return value


# -- what is declared -------------------------------------------------------------------------


@functools.cache
def _model(owner: Callable[..., Any]) -> type[BaseModel]:
    config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)
    # The defaults do not matter: only given values are checked and returned.
    fields: dict[str, Any] = {name: (hint, None) for name, hint in _declared(owner).items()}
    return create_model("Settings", __config__=config, **fields)


def _declared(owner: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of the settings, by name."""
    if isinstance(owner, functools.partial):
        return _declared(owner.func)
    if dataclasses.is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(owner) if field.init}
    function = owner.__init__ if isinstance(owner, type) else owner  # type: ignore[misc]  # read only
    hints = get_type_hints(function, include_extras=True)
    names = inspect.signature(function).parameters
    return {name: hint for name, hint in hints.items() if name in names}


def _alternatives(hint: Any) -> list[Any]:
    """Returns the types in a hint, without their annotations."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    return [hint]

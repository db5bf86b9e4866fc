"""Says in words what a setting takes, from the annotation that pydantic checks it by."""

from __future__ import annotations

import collections.abc
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel

__all__ = ["Expected", "describe_expected", "explicit_expectation", "item_hint"]

_UNIONS = (Union, types.UnionType)
_SEQUENCES = (list, tuple, collections.abc.Sequence)
_NOUNS = {bool: "true or false", str: "text", dict: "a mapping", Path: "a path"}


@dataclass(frozen=True)
class Expected:
    """Describes in an error what a setting takes, if its type and bounds do not.

    Attributes:
        what: completes the words "expected ...".
    """

    what: str


def describe_expected(hint: Any, notes: Sequence[Any] = ()) -> str | None:
    """Returns what completes "expected ...", such as ``an integer from 1 to 10``.

    Args:
        hint: a type, or an annotation of one.
        notes: further annotations of it: bounds, and `Expected`.

    Returns:
        None if the type has no name that a user knows.
    """
    if explicit := explicit_expectation(hint, notes):
        return explicit
    if get_origin(hint) is Annotated:
        first, *more = get_args(hint)
        return describe_expected(first, [*more, *notes])
    if get_origin(hint) in _UNIONS:
        parts = [part for part in get_args(hint) if part is not type(None)]
        words = [describe_expected(part, notes) for part in parts]
        return None if None in words else " or ".join(dict.fromkeys(map(str, words)))
    if hint in (int, float):
        return f"{'an integer' if hint is int else 'a number'}{_bounds(notes)}"
    return _noun(get_origin(hint) or hint, hint)


def explicit_expectation(hint: Any, notes: Sequence[Any] = ()) -> str | None:
    """Returns what an `Expected` says, which is part of the annotation; None without one."""
    more = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((each.what for each in (*notes, *more) if isinstance(each, Expected)), None)


def item_hint(hint: Any) -> Any:
    """Returns the annotation of a sequence's items; None if `hint` is not a sequence."""
    if get_origin(hint) is Annotated:
        return item_hint(get_args(hint)[0])
    if get_origin(hint) in _UNIONS:
        return next(filter(None, map(item_hint, get_args(hint))), None)
    return get_args(hint)[0] if get_origin(hint) in _SEQUENCES else None


def _noun(kind: Any, hint: Any) -> str | None:
    if kind is Literal:
        return " or ".join(repr(each) for each in get_args(hint))
    if kind in _SEQUENCES:
        return "a list of texts" if item_hint(hint) else "a list"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a mapping"
    return _NOUNS.get(kind)


def _bounds(notes: Sequence[Any]) -> str:
    single = [one for each in notes for one in getattr(each, "metadata", [each])]
    above = [one.gt for one in single if isinstance(one, annotated_types.Gt)]
    least = [one.ge for one in single if isinstance(one, annotated_types.Ge)]
    below = [one.lt for one in single if isinstance(one, annotated_types.Lt)]
    most = [one.le for one in single if isinstance(one, annotated_types.Le)]
    if least and most:
        return f" from {least[0]:,} to {most[0]:,}"
    parts = [f"above {bound:,}" for bound in above] + [f"of {bound:,} or more" for bound in least]
    parts += [f"below {bound:,}" for bound in below] + [f"at most {bound:,}" for bound in most]
    return f" {' and '.join(parts)}" if parts else ""

"""Selects rows and columns of a run: by name patterns, steps and times."""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.store import Block

__all__ = [
    "Moment",
    "SelectionError",
    "Steps",
    "Times",
    "make_name_filter",
    "select_rows",
    "take_rows",
]

Moment = float | str | datetime
"""Seconds since the epoch, a datetime (a `pandas.Timestamp` is one), or an ISO string."""

Steps = tuple[int | None, int | None]
Times = tuple[Moment | None, Moment | None]


class SelectionError(InputError):
    """The selection itself is wrong, for any run."""


def make_name_filter(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Returns a function that tells whether a name equals or matches one of `patterns`.

    Args:
        patterns: shell-style and case-sensitive; every name matches if there are none.

    Raises:
        SelectionError: a pattern is not a string.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SelectionError(
                f"metrics: pattern is {pattern!r}; expected a string such as 'grad/*'"
            )
    exact = frozenset(patterns)  # there may be thousands, of which few are patterns
    globs = [pattern for pattern in exact if glob.has_magic(pattern)]
    return lambda name: (
        not exact or name in exact or any(fnmatch.fnmatchcase(name, p) for p in globs)
    )


def take_rows(block: Block, rows: Any) -> Block:
    """Returns some rows of a block.

    Args:
        block: N rows.
        rows: a mask, bool [N], or row indices.
    """
    values = block.values[rows]  # noqa: PD011 - an array already
    return Block(block.names, block.steps[rows], block.times[rows], values, block.present[rows])


def select_rows(block: Block, steps: Steps | None, times: Times | None) -> Block:
    """Returns the rows between two steps and between two times.

    Args:
        block: the rows to choose from.
        steps: ``(first, last)``, both included; None for no limit.
        times: ``(first, last)``, both included; None for no limit.

    Raises:
        InputError: a limit is invalid, or the run has no times to compare with.
    """
    if steps is None and times is None:
        return block
    mask = np.ones(len(block.steps), bool)
    if steps is not None:
        first, last = _parse_range("steps", steps, _parse_step, "integers")
        mask &= (block.steps >= first) & (block.steps <= last)
    if times is not None:
        if len(block.times) and np.isnan(block.times).all():
            raise InputError(
                f"metrics: times is {times!r}, but this run recorded no times; "
                "use steps=(first, last)"
            )
        # A mask, not a search: a clock that was set back leaves times that do not ascend.
        first, last = _parse_range("times", times, _parse_time, "seconds, datetimes, ISO strings")
        mask &= (block.times >= first) & (block.times <= last)
    return take_rows(block, mask)


def _parse_range(
    key: str, given: Sequence[Any], parse: Callable[[Any], float | None], expected: str
) -> tuple[float, float]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise SelectionError(
            f"metrics: {key} is {given!r}; expected (first, last), where None means no limit"
        )
    limits = [None if limit is None else parse(limit) for limit in given]
    for limit, value in zip(given, limits, strict=True):
        if limit is not None and (value is None or math.isnan(value)):
            raise SelectionError(
                f"metrics: {key} has the limit {limit!r}; expected {expected} or None"
            )
    first = -math.inf if limits[0] is None else limits[0]
    last = math.inf if limits[1] is None else limits[1]
    if first > last:
        raise SelectionError(f"metrics: {key} is {given!r}; expected first <= last")
    return first, last


def _parse_step(value: object) -> float | None:
    return int(value) if isinstance(value, int | np.integer) else None


def _parse_time(value: object) -> float | None:
    """Returns seconds since the epoch; reads a time without a zone as local time."""
    if isinstance(value, int | float | np.number):
        return float(value)
    try:
        moment = pd.Timestamp(value)  # type: ignore[arg-type]
        return moment.to_pydatetime(warn=False).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None

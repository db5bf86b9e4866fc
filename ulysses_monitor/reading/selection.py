"""Which rows and columns of a run are asked for: patterns, steps, times."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.store import Block

__all__ = ["Moment", "SelectionError", "Steps", "Times", "matching", "rows_of", "select_rows"]

Moment = float | str | datetime
"""Seconds since the epoch, a datetime (a `pandas.Timestamp` is one), or an ISO string."""

Steps = tuple[int | None, int | None]
Times = tuple[Moment | None, Moment | None]


class SelectionError(InputError):
    """What was asked of a run is wrong, whatever the run."""


def matching(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is one of `patterns` or matches one, letter by letter; all if none is given.

    Raises:
        InputError: a pattern is not a string.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SelectionError(
                f"metrics: got {pattern!r}; a pattern is a string such as 'grad/*'"
            )
    return lambda name: (
        not patterns or any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns)
    )


def rows_of(block: Block, rows: Any) -> Block:
    """Some rows of a block, by mask or places."""
    values = block.values[rows]  # noqa: PD011 - an array already
    return Block(block.names, block.steps[rows], block.times[rows], values, block.present[rows])


def select_rows(block: Block, steps: Steps | None, times: Times | None) -> Block:
    """The rows between two steps and between two times, ends included; None is no limit.

    Raises:
        InputError: a limit cannot be read, or the run has no times to compare with.
    """
    if steps is None and times is None:
        return block
    mask = np.ones(len(block.steps), bool)
    if steps is not None:
        first, last = _limits("steps", steps, _step)
        mask &= (block.steps >= first) & (block.steps <= last)
    if times is not None:
        if len(block.times) and np.isnan(block.times).all():
            raise InputError("times: this run recorded no times; choose by steps=(first, last)")
        # A mask, not a search: a clock that was set back leaves times that do not ascend.
        first, last = _limits("times", times, _seconds)
        mask &= (block.times >= first) & (block.times <= last)
    return rows_of(block, mask)


def _limits(
    key: str, given: Sequence[Any], read: Callable[[Any], float | None]
) -> tuple[float, float]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise SelectionError(f"{key}: got {given!r}; give (first, last), either may be None")
    known = [None if limit is None else read(limit) for limit in given]
    for limit, value in zip(given, known, strict=True):
        if limit is not None and (value is None or math.isnan(value)):
            allowed = "whole numbers" if key == "steps" else "seconds, a datetime, an ISO string"
            raise SelectionError(f"{key}: got {limit!r}; allowed are {allowed}, or None")
    first = -math.inf if known[0] is None else known[0]
    last = math.inf if known[1] is None else known[1]
    if first > last:
        raise SelectionError(f"{key}: {given[0]!r} comes after {given[1]!r}")
    return first, last


def _step(value: object) -> float | None:
    return int(value) if isinstance(value, int | np.integer) else None


def _seconds(value: object) -> float | None:
    """Seconds since the epoch; a time without a zone is of this machine's, as it is shown."""
    if isinstance(value, int | float | np.number):
        return float(value)
    try:
        moment = pd.Timestamp(value)  # type: ignore[arg-type]
        return moment.to_pydatetime(warn=False).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None

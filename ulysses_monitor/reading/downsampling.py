"""Reduces the rows of a run without losing an extreme; every row it keeps is a recorded one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ulysses_monitor.reading.selection import SelectionError
from ulysses_monitor.store import Block

__all__ = ["keep_extremes"]

_Rows = npt.NDArray[np.intp]


def keep_extremes(block: Block, points: int) -> _Rows:
    """Selects at most `points` rows of a block; selects all of them if they fit.

    Rows are selected in this order:

    1. the first and the last row, and for each metric the rows with its smallest and its largest
       finite value;
    2. rows in which a metric was measured as NaN or Inf: all of them, or, if they would take more
       than half of `points`, an evenly spaced subset;
    3. with the remaining budget, the smallest and the largest finite value of each metric in each
       of as many equal stretches of rows as fit.

    Args:
        block: N rows of M metrics.
        points: the largest number of rows to select.

    Returns:
        Row indices, ascending [at most `points`].

    Raises:
        SelectionError: `points` is not an integer of 2 or more, or is too small for the rows of
            the first group.
    """
    _check_points(points)
    count, columns = len(block.steps), len(block.names)
    if count <= points:
        return np.arange(count)
    ends = np.array([0, count - 1], np.intp)
    required = np.union1d(ends, _find_extremes(block, count))
    if len(required) > points:
        raise SelectionError(
            f"metrics: points is {points}; expected {len(required)} or more to keep the extremes "
            f"of {columns} metrics, or fewer metrics"
        )
    budget = min(points // 2, points - len(required))
    kept = np.union1d(ends, _space_evenly(_find_nonfinite(block), budget))
    stretches = (points - len(kept)) // (2 * columns)
    extremes = _find_extremes(block, -(-count // stretches)) if stretches > 1 else required
    return np.union1d(kept, extremes)


def _check_points(points: object) -> None:
    if isinstance(points, bool) or not isinstance(points, int | np.integer) or points < 2:
        raise SelectionError(f"metrics: points is {points!r}; expected an integer of 2 or more")


def _find_extremes(block: Block, length: int) -> _Rows:
    """Returns the rows with the minimum and maximum of each column in each `length` rows."""
    found = []
    for column in block.values.T:  # a column at a time: a run may be wider than memory
        found += [_find_minima(column, length), _find_minima(-column, length)]
    return np.unique(np.concatenate(found))


def _find_minima(column: npt.NDArray[np.float32], length: int) -> _Rows:
    stretches = -(-len(column) // length)
    padded = np.full(stretches * length, np.inf, np.float32)
    padded[: len(column)] = np.where(np.isfinite(column), column, np.inf)
    table = padded.reshape(stretches, length)
    rows = table.argmin(axis=1) + np.arange(stretches) * length
    found: _Rows = rows[np.isfinite(padded[rows])]
    return found


def _find_nonfinite(block: Block) -> _Rows:
    """Returns the rows in which a measured value is NaN or Inf."""
    nonfinite = np.zeros(len(block.steps), bool)
    for values, present in zip(block.values.T, block.present.T, strict=True):
        nonfinite |= present & ~np.isfinite(values)
    return np.flatnonzero(nonfinite)


def _space_evenly(rows: _Rows, limit: int) -> _Rows:
    """Returns `rows`, or `limit` of them, evenly spaced, with the first and the last."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.intp)]

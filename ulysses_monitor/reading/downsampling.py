"""Fewer rows of a run, of which none is invented and no extreme is lost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ulysses_monitor.reading.selection import SelectionError
from ulysses_monitor.store import Block

__all__ = ["keep_extremes"]

_Rows = npt.NDArray[np.intp]


def keep_extremes(block: Block, points: int) -> _Rows:
    """Places of at most `points` rows of a block, ascending; all where it has no more.

    Kept are, in this order:

    1. the first and the last row, and for each metric the rows with its smallest and its largest
       finite value;
    2. rows in which a metric was measured as NaN or Inf: all of them, or, if there are more than
       half of `points`, some that are evenly spread;
    3. with the rest, as many equal stretches of rows as can be had, and for each metric its
       smallest and largest finite value in each stretch.

    Args:
        block: the rows.
        points: how many to keep at most.

    Raises:
        SelectionError: `points` cannot hold what comes first.
    """
    count, columns = len(block.steps), len(block.names)
    if isinstance(points, bool) or not isinstance(points, int | np.integer) or points < 2:
        raise SelectionError(f"points: got {points!r}; allowed is a whole number from 2")
    if count <= points:
        return np.arange(count)
    ends = np.array([0, count - 1], np.intp)
    least = np.union1d(ends, _extremes(block, count))
    if len(least) > points:
        raise SelectionError(
            f"points={points} cannot hold the extremes of {columns} metrics; allowed is "
            f"{len(least)} or more, or fewer metrics"
        )
    broken = _spread(_broken(block), min(points // 2, points - len(least)))
    always = np.union1d(ends, broken)
    stretches = (points - len(always)) // (2 * columns)
    found = _extremes(block, -(-count // stretches)) if stretches > 1 else least
    return np.union1d(always, found)


def _extremes(block: Block, length: int) -> _Rows:
    """Rows with the smallest and largest value of each column in each stretch of `length` rows."""
    found = []
    for column in block.values.T:  # a column at a time: a run may be wider than memory
        found += [_lowest(column, length), _lowest(-column, length)]
    return np.unique(np.concatenate(found))


def _lowest(column: npt.NDArray[np.float32], length: int) -> _Rows:
    stretches = -(-len(column) // length)
    padded = np.full(stretches * length, np.inf, np.float32)
    padded[: len(column)] = np.where(np.isfinite(column), column, np.inf)
    table = padded.reshape(stretches, length)
    rows = table.argmin(axis=1) + np.arange(stretches) * length
    found: _Rows = rows[np.isfinite(padded[rows])]
    return found


def _broken(block: Block) -> _Rows:
    """Rows in which something was measured that is not finite."""
    broken = np.zeros(len(block.steps), bool)
    for values, present in zip(block.values.T, block.present.T, strict=True):
        broken |= present & ~np.isfinite(values)
    return np.flatnonzero(broken)


def _spread(rows: _Rows, most: int) -> _Rows:
    """`rows`, or `most` of them, evenly spread, with the first and the last."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.intp)]

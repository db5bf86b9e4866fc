"""Steps of one file or of several, as arrays.

Legend: N steps of a block, M metrics of a block, S steps of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Block", "DamagedError", "merge", "overlay_column"]


@dataclass(frozen=True)
class Block:
    """Steps with the requested metrics.

    Attributes:
        names: metric names [M].
        steps: int64 [N].
        times: seconds since the epoch, float64 [N].
        values: float32 [N, M]; NaN where a step does not have the metric.
        present: whether the step has the metric, bool [N, M]; needed because a metric can be NaN.
            By default, all steps have all metrics.
    """

    names: tuple[str, ...]
    steps: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    values: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_] = field(default_factory=lambda: np.ones((), np.bool_))

    def __post_init__(self) -> None:
        if not self.present.ndim:
            object.__setattr__(self, "present", np.broadcast_to(self.present, self.values.shape))

    @classmethod
    def empty(cls, names: tuple[str, ...] = ()) -> Block:
        """Returns a block without steps."""
        shape = (0, len(names))
        return cls(names, np.zeros(0, np.int64), np.zeros(0), np.zeros(shape, np.float32))

    def select(self, chosen: Sequence[int]) -> Block:
        """Returns some of the columns, by their positions."""
        names = tuple(self.names[i] for i in chosen)
        present = self.present[:, chosen]
        return Block(names, self.steps, self.times, self.values[:, chosen], present)

    def drop_empty_rows(self) -> Block:
        """Returns the block without the steps that have none of its metrics."""
        rows = self.present.any(axis=1)
        if rows.all():
            return self
        steps, times = self.steps[rows], self.times[rows]
        return Block(self.names, steps, times, self.values[rows], self.present[rows])


class DamagedError(ValueError):
    """A part of a file is damaged; `block` has the rest of it."""

    def __init__(self, reason: str, block: Block) -> None:
        super().__init__(reason)
        self.block = block


def merge(blocks: Sequence[Block]) -> Block:
    """Merges blocks, oldest first, into one row per step and one column per name.

    If two blocks have the same metric at the same step, the later one wins, even if its value is
    NaN, because it comes from the later training of that step.
    """
    blocks = [b for b in blocks if len(b.steps)]
    names = tuple(dict.fromkeys(name for block in blocks for name in block.names))
    column = {name: i for i, name in enumerate(names)}
    steps = _union([block.steps for block in blocks])
    times = np.zeros(len(steps))
    # [M, S] -> [S, M]: column by column in memory, because readers take whole metrics.
    values = np.full((len(names), len(steps)), np.nan, np.float32).T
    present = np.zeros((len(names), len(steps)), bool).T
    for block in blocks:
        rows = np.searchsorted(steps, block.steps)
        times[rows] = block.times
        for own, name in enumerate(block.names):
            overlay_column(values[:, column[name]], present[:, column[name]], rows, block, own)
    return Block(names, steps, times, values, present)


def _union(steps: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Returns all steps ascending, each once.

    `np.unique` takes 20 times as long for steps that are sorted already.
    """
    together = np.concatenate([np.zeros(0, np.int64), *steps])
    if (together[1:] > together[:-1]).all():
        return together
    together.sort(kind="stable")
    first = np.ones(len(together), bool)
    first[1:] = together[1:] != together[:-1]
    return together[first]


def overlay_column(
    values: npt.NDArray[np.float32],
    present: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.intp],
    block: Block,
    column: int,
) -> None:
    """Overlays a column of the run with one of `block`.

    Args:
        values: values of the run's column [S], changed in place.
        present: which of them are present [S], changed in place.
        rows: positions of the block's steps in the run [N].
        block: the block.
        column: position of the column in the block.
    """
    has = block.present[:, column]
    if not has.all():
        rows = rows[has]
        values[rows] = block.values[has, column]
    else:
        values[rows] = block.values[:, column]
    present[rows] = True

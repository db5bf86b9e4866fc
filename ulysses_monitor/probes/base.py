"""What a probe is: partial sums over local shards, and the metrics made of their total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ulysses_monitor.engines import Shard
from ulysses_monitor.records import Cost

__all__ = ["FollowUp", "Probe", "Reading"]


@dataclass(frozen=True)
class Reading:
    """What probes read at one step, on this rank.

    Attributes:
        shards: the shards this rank counts.
        grad_scale: the factor by which gradients are multiplied.
        careful: whether a first reading of this step met NaN or Inf, so that it is worth the time
            to look at each element.
    """

    shards: Sequence[Shard]
    grad_scale: Tensor | float
    is_recheck: bool = False


class Probe(Protocol):
    """Reads shards on every rank and turns the ranks' reduced vectors into metrics.

    `read` runs on each rank over its own shards and returns a vector whose length depends on the
    layout alone, zeros where the rank holds nothing: the vectors of all probes travel in one
    all-reduce. `values` runs on the host with the result.
    """

    name: str
    cost: Cost
    size: int
    """Numbers that are added up over ranks."""
    maxima: int
    """Numbers per parameter, after them, of which the largest over ranks is taken."""
    names: tuple[str, ...]
    """Names of the metrics, in the order of `values`."""
    rechecks: bool
    """Whether to read the step once more, `Reading.careful`, if a number is not finite."""

    def read(self, reading: Reading) -> Tensor:
        """Float64 [size + maxima * P], on the shards' device; never a copy to the host."""
        ...

    def values(self, totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """The metrics [len(names)] from what `read` gave, reduced over ranks.

        None means that there was nothing to measure (an optimizer that keeps no such state).
        """
        ...


class FollowUp(Probe, Protocol):
    """A probe of what a step did: it looks after the step, and travels with the next one's vector.

    Its metrics carry the number of the step they are about.
    """

    def before_step(self, shards: Sequence[Shard]) -> None:
        """Called with all shards where the coming step is to be measured."""
        ...

    def after_step(self, shards: Sequence[Shard]) -> None:
        """Called where that step was done; the gradients are gone."""
        ...

"""What a probe is: partial sums over local shards, and the metrics made of their total."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ulysses_monitor.engines import Shard
from ulysses_monitor.records import Cost

__all__ = ["Probe"]


class Probe(Protocol):
    """Reads shards on every rank and turns the ranks' added-up sums into metrics.

    `sums` runs on each rank over its own shards and returns a vector whose length depends on the
    layout alone, zeros where the rank holds nothing: the vectors of all probes travel in one
    all-reduce. `values` runs on the host with the totals.
    """

    name: str
    cost: Cost
    size: int
    """Length of the vector that `sums` returns, alike on all ranks."""
    names: tuple[str, ...]
    """Names of the metrics, in the order of `values`."""

    def sums(self, shards: Sequence[Shard], grad_scale: float) -> Tensor:
        """Partial sums, float64 [size], on the shards' device; never a host copy."""
        ...

    def values(self, totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """The metrics [len(names)] from the totals over all ranks [size].

        None means that there was nothing to measure (an optimizer that keeps no such state).
        """
        ...

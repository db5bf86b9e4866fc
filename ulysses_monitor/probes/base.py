"""The probe contract: partial sums over local shards, and metrics from their totals.

A step runs every active probe in two halves::

    vector = probe.read(reading)         on each rank, over its own shards
    totals = all_reduce(all vectors)     one collective and one copy to the host for all probes
    metrics = probe.values(totals)       on the host, the same on all ranks

To add a probe, write a class with the members of `Probe` and add it to `assemble`. A probe of what
the step did, which can be seen only afterwards, is a `FollowUp`.

Legend: P trainable parameters, M metrics of the probe.
"""

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
    """What this rank gives its probes to read at one step.

    Attributes:
        shards: the shards that this rank counts.
        grad_scale: the factor that the gradients still carry (the loss scale), else 1.
        is_recheck: whether the first reading of this step found NaN or Inf, so that a probe should
            take the time to look at every element.
    """

    shards: Sequence[Shard]
    grad_scale: Tensor | float
    is_recheck: bool = False


class Probe(Protocol):
    """Reads shards on every rank and turns the reduced vector into metrics.

    The length of the vector depends only on the parameters, never on what a rank holds, because
    the vectors of all probes travel in one all-reduce. Where a rank holds nothing it sends zeros.
    """

    name: str
    """Name of the probe in log messages; unique in a run."""
    cost: Cost
    """Whether the probe is read at ``every`` step or at ``sampled`` ones."""
    size: int
    """Length of the vector's first part, which is summed over ranks."""
    maxima: int
    """Rows [P] in the vector's second part, of which the largest value over ranks is taken."""
    names: tuple[str, ...]
    """Names of the metrics [M], in the order of `values`."""
    rechecks: bool
    """Whether to read the step again, with `Reading.is_recheck`, if a total is not finite."""

    def read(self, reading: Reading) -> Tensor:
        """Returns this rank's vector, float64 [size + maxima * P], on the shards' device.

        It must not copy to the host.
        """
        ...

    def values(self, totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Returns the metrics [M], or None if there was nothing to measure.

        For example, an optimizer may keep no such state.

        Args:
            totals: the vectors of `read`, reduced over ranks [size + maxima * P].
        """
        ...


class FollowUp(Probe, Protocol):
    """A probe of what a step did, which it can see only after the step.

    Its vector travels with that of the next step; its metrics carry the number of the step that
    they describe.
    """

    def before_step(self, shards: Sequence[Shard]) -> None:
        """Prepares for a step that will be measured; gets all shards of this rank."""
        ...

    def after_step(self, shards: Sequence[Shard]) -> None:
        """Measures the step, unless it was skipped; the gradients are gone."""
        ...

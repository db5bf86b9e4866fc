"""Clipping of the global norm, by a fixed threshold or by the run's own norms."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ulysses_monitor.common.settings import MetricName
from ulysses_monitor.policies.base import NORM, BuiltinPolicy, Share
from ulysses_monitor.policies.bounds import UNLIMITED, BoundedPolicy
from ulysses_monitor.records import Action, StepRecord

__all__ = ["AutoClip", "ThresholdClipping", "ZClip", "clip_norm", "is_usable"]


def is_usable(norm: float) -> bool:
    """Tells whether a memory of norms may hold this norm.

    An unknown or overflowed norm would stay there as NaN. A zero, from a step without labels, would
    become the norm to clip to and stop the training.
    """
    return 0 < norm < math.inf


def clip_norm(max_norm: float, norm: float, reason: str) -> Action:
    """Makes the action that clips the global norm, which is `norm` now."""
    return Action(kind="clip_norm", values={"max_norm": max_norm}, reason=reason, read={NORM: norm})


@dataclass(kw_only=True)
class ThresholdClipping(BoundedPolicy):
    """Clips the norm while a metric is above a threshold.

    Source: the original design of this project: norm 1 where the mean over tensors of mean |g| is
    above 5.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm"})

    above: Annotated[float, Field(gt=0, le=10**9)] = 5.0
    """Threshold above which the policy starts to act."""
    metric: MetricName = "grad/abs_mean/tensor_mean"
    """The metric that is compared with the threshold."""
    max_norm: Annotated[float, Field(gt=0, le=10**9)] = 1.0
    """The norm to clip to."""
    recovered: Share = 0.8
    """The policy stops acting once the metric is below `above` times this."""
    longest: Annotated[int, Field(ge=1)] = UNLIMITED
    """See `BoundedPolicy`; by default the clipping never pauses."""

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (self.metric,)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        value = history[-1].get(self.metric)
        if math.isnan(value):
            return  # not measured at this step
        if self.should_act(value > self.above, value > self.above * self.recovered):
            yield Action(
                kind="clip_norm",
                values={"max_norm": self.max_norm},
                reason=f"{self.metric} is above {self.above:g}",
                read={self.metric: value},
            )


@dataclass(kw_only=True)
class NormHistoryClipping(BuiltinPolicy):
    """Clips to a norm that the run's earlier norms set, after `warmup` steps that only collect."""

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm"})

    warmup: int

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (NORM,)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        norm = history[-1].get(NORM)
        return self._clip(norm) if is_usable(norm) else ()

    def _clip(self, norm: float) -> Iterable[Action]:
        """Remembers a norm and clips it if it is too large."""
        raise NotImplementedError


@dataclass(kw_only=True)
class AutoClip(NormHistoryClipping):
    """Clips to a percentile of the norms seen so far.

    Source: arXiv:2007.14469 (Seetharaman et al., 2020): the 10th percentile of the whole history,
    which clips nine steps of ten. Here the history is the last `window` norms; zeros do not count.
    """

    percentile: Annotated[float, Field(gt=0, le=99.999)] = 10.0
    """Percentile of the norms seen, including this step's."""
    window: Annotated[int, Field(ge=2, le=100_000)] = 10_000
    """Number of norms to look back on."""
    warmup: Annotated[int, Field(ge=0)] = 10
    """Steps that are not clipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.window:
            raise self._refusal(
                f"warmup is {self.warmup}; expected less than window, which is {self.window}"
            )

    def _clip(self, norm: float) -> Iterable[Action]:
        limit = self._percentile_with(norm)
        if len(self.memory["norms"]) > self.warmup and norm > limit:
            yield clip_norm(limit, norm, f"above the {self.percentile:g}th percentile of norms")

    def _percentile_with(self, norm: float) -> float:
        """Adds a norm and returns the percentile, interpolated linearly as NumPy does."""
        norms = self.memory.setdefault("norms", [])
        ordered = self.memory.setdefault("ordered", [])
        norms.append(norm)
        bisect.insort(ordered, norm)
        while len(norms) > self.window:
            del ordered[bisect.bisect_left(ordered, norms.pop(0))]
        place = (len(ordered) - 1) * self.percentile / 100.0
        low, part = int(place), place % 1
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (ordered[high] - ordered[low]) * part)


@dataclass(kw_only=True)
class ZClip(NormHistoryClipping):
    """Clips norms that are outliers of their moving average; the further out, the harder.

    Source: arXiv:2504.02507 (Kumar et al., 2025): a norm of z > 2.5 standard deviations above its
    moving mean is clipped to mean + (2.5**2 / z) standard deviations, and enters the averages as
    clipped. Two things differ from the authors' code: their further clip to norm 1 is left to the
    Trainer, and the 1e-6 that they add to the deviation is a share of the mean. Zeros do not count.
    """

    alpha: Annotated[float, Field(gt=0, le=0.999999)] = 0.97
    """Decay of the moving averages."""
    z: Annotated[float, Field(gt=0, le=100)] = 2.5
    """Standard deviations above the mean at which a norm is an outlier."""
    warmup: Annotated[int, Field(ge=2, le=10_000)] = 25
    """Steps that give the first mean and variance."""

    def _clip(self, norm: float) -> Iterable[Action]:
        memory = self.memory
        if "mean" not in memory:
            self._warm_up(norm)
            return
        std = math.sqrt(memory["variance"])
        z = (norm - memory["mean"]) / (std + 1e-6 * memory["mean"])
        limit = memory["mean"] + self.z**2 / z * std if z > self.z else norm
        if z > self.z:
            yield clip_norm(limit, norm, f"the norm is {z:.3g} standard deviations above its mean")
        memory["mean"] += (1 - self.alpha) * (limit - memory["mean"])
        memory["variance"] *= self.alpha
        memory["variance"] += (1 - self.alpha) * (limit - memory["mean"]) ** 2

    def _warm_up(self, norm: float) -> None:
        first = self.memory.setdefault("first", [])
        first.append(norm)
        if len(first) >= self.warmup:
            self.memory |= {"mean": float(np.mean(first)), "variance": float(np.var(first))}
            del self.memory["first"]

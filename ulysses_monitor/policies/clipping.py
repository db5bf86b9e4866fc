"""Clipping by thresholds that are set, or that follow the run's own norms."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ulysses_monitor.policies.base import BuiltinPolicy, check_metric, check_value, checked_texts
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import Array, fingerprint, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["AGC", "AdaGC", "AutoClip", "ThresholdClipping", "ZClip"]

_NORM = "grad/norm/total"


def _says_something(norm: float) -> bool:
    """Whether a norm may enter a memory of norms.

    One that is not known or overflowed would stay there as NaN; zeros, of steps without a label,
    would become the norm that is clipped to, and stop the training.
    """
    return 0 < norm < math.inf


def _clip_norm(most: float, norm: float, why: str) -> Action:
    return Action(kind="clip_norm", values={"max_norm": most}, reason=why, read={_NORM: norm})


@dataclass(kw_only=True)
class ThresholdClipping(BoundedPolicy):
    """Clips the norm while a metric is above a threshold.

    Source: the original design of this project: norm 1 where the mean over tensors of mean |g| is
    above 5.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm"})

    above: float = 5.0
    """Where it begins to act."""
    metric: str = "grad/abs_mean/tensor_mean"
    """What is large."""
    max_norm: float = 1.0
    """The norm it clips to."""
    recovered: float = 0.8
    """It stops acting where the metric is below `above` times this."""
    longest: int = 1 << 53
    """See `BoundedPolicy`; clipping does not tire."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "clip_threshold"
        check_metric(what, "metric", self.metric)
        check_value(what, "above", self.above, 0, 1e9)
        check_value(what, "max_norm", self.max_norm, 0, 1e9)
        check_value(what, "recovered", self.recovered, 0, 1)

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
class AutoClip(BuiltinPolicy):
    """Clips to a percentile of the norms seen so far.

    Source: arXiv:2007.14469 (Seetharaman et al., 2020): the 10th percentile of the whole history.
    It clips nine steps of ten. Here the history is the last `window` norms; zeros do not count.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm"})

    percentile: float = 10.0
    """Of the norms seen, this one included."""
    window: int = 10_000
    """Norms that are looked back on."""
    warmup: int = 10
    """Steps that only look."""

    def __post_init__(self) -> None:
        what = self.name or "autoclip"
        check_value(what, "percentile", self.percentile, 0, 99.999)
        check_value(what, "window", self.window, 2, 100_000, whole=True)
        check_value(what, "warmup", self.warmup, 0, self.window - 1, whole=True)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (_NORM,)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        norm = history[-1].get(_NORM)
        if not _says_something(norm):
            return
        most = self._percentile_with(norm)
        if len(self.memory["norms"]) > self.warmup and norm > most:
            yield _clip_norm(most, norm, f"above the {self.percentile:g}th percentile of norms")

    def _percentile_with(self, norm: float) -> float:
        """With linear interpolation between the two nearest, as NumPy's."""
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
class ZClip(BuiltinPolicy):
    """Clips norms that are outliers of their moving average, the more the further out they are.

    Source: arXiv:2504.02507 (Kumar et al., 2025): a norm of z > 2.5 standard deviations above its
    moving mean is clipped to mean + (2.5**2 / z) standard deviations, and enters the averages as
    what it was clipped to. Of what the authors publish, the further clip to norm 1 is left to the
    Trainer's own, and the 1e-6 that they add to the deviation is a share of the mean. Zeros do not
    count.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm"})

    alpha: float = 0.97
    """Of the moving averages."""
    z: float = 2.5
    """Standard deviations above the mean."""
    warmup: int = 25
    """Steps that make the first mean and variance."""

    def __post_init__(self) -> None:
        what = self.name or "zclip"
        check_value(what, "alpha", self.alpha, 0, 0.999999)
        check_value(what, "z", self.z, 0, 100)
        check_value(what, "warmup", self.warmup, 2, 10_000, whole=True)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (_NORM,)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        norm, memory = history[-1].get(_NORM), self.memory
        if not _says_something(norm):
            return
        if "mean" not in memory:
            self._warm_up(norm)
            return
        std = math.sqrt(memory["variance"])
        z = (norm - memory["mean"]) / (std + 1e-6 * memory["mean"])
        most = memory["mean"] + self.z**2 / z * std if z > self.z else norm
        if z > self.z:
            yield _clip_norm(most, norm, f"the norm is {z:.3g} standard deviations above its mean")
        memory["mean"] += (1 - self.alpha) * (most - memory["mean"])
        memory["variance"] *= self.alpha
        memory["variance"] += (1 - self.alpha) * (most - memory["mean"]) ** 2

    def _warm_up(self, norm: float) -> None:
        first = self.memory.setdefault("first", [])
        first.append(norm)
        if len(first) >= self.warmup:
            self.memory |= {"mean": float(np.mean(first)), "variance": float(np.var(first))}
            del self.memory["first"]


@dataclass(kw_only=True)
class AdaGC(BuiltinPolicy):
    """Clips each tensor by a moving average of its own norm.

    Source: arXiv:2502.11034 (Wang et al., 2025): after `warmup` steps, in which all gradients
    together are clipped to `absolute` and each tensor's smallest norm is noted, a tensor's norm is
    at most 1.05 times the moving average (0.98) of its clipped norms. A norm of zero, as of a LoRA
    A at its first step, is not noted here: it would hold the tensor at zero for good.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm", "clip_each"})

    relative: float = 1.05
    """Times the moving average; below 1 that shrinks at every step, down to nothing."""
    beta: float = 0.98
    """Of the moving average."""
    absolute: float = 1.0
    """The common norm during the warm-up."""
    warmup: int = 100
    """Steps that are clipped together."""

    def __post_init__(self) -> None:
        what = self.name or "adagc"
        check_value(what, "relative", self.relative, 0, 1e3)
        check_value(what, "beta", self.beta, 0, 0.999999)
        check_value(what, "absolute", self.absolute, 0, 1e9)
        check_value(what, "warmup", self.warmup, 1, 1_000_000, whole=True)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return ("grad/norm/param/*", _NORM)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, memory = history[-1], self.memory
        names, norms = parameter_values(record, "grad/norm")
        if not _says_something(float(norms.sum())):
            return
        tensors = fingerprint(names)
        if memory.setdefault("tensors", tensors) != tensors:
            memory.clear()  # other parameters are trained than before
            memory["tensors"] = tensors
        seen = memory["seen"] = memory.get("seen", 0) + 1
        limits = np.asarray(memory.get("limits", np.zeros(len(names))))
        warming = seen <= self.warmup
        clipped, limits = (self._together if warming else self._apart)(norms, limits)
        memory["limits"] = limits.tolist()
        norm = record.get(_NORM)
        if warming and norm > self.absolute:
            yield _clip_norm(self.absolute, norm, "warm-up of the tensors' own limits")
        over = np.flatnonzero(clipped < norms)
        if not warming and len(over):
            yield Action(
                kind="clip_each",
                values={names[i]: float(clipped[i]) for i in over},
                targets=tuple(names[i] for i in over),
                reason=f"{len(over)} tensors are above their own moving average",
                read={f"grad/norm/param/{names[i]}": float(norms[i]) for i in over[:3]},
            )

    def _together(self, norms: Array, limits: Array) -> tuple[Array, Array]:
        total = float(np.sqrt(np.square(norms).sum()))
        clipped = norms * min(1.0, self.absolute / total)
        smaller = (clipped > 0) & ((limits == 0) | (clipped < limits))
        return clipped, np.where(smaller, clipped, limits)

    def _apart(self, norms: Array, limits: Array) -> tuple[Array, Array]:
        known = limits > 0
        clipped = np.where(known, np.minimum(norms, self.relative * limits), norms)
        moved = self.beta * limits + (1 - self.beta) * clipped
        return clipped, np.where(known & (norms > 0), moved, np.where(known, limits, norms))


@dataclass(kw_only=True)
class AGC(BuiltinPolicy):
    """Clips each row of a gradient by its weights' norm, at every step.

    Source: arXiv:2102.06171 (Brock et al., 2021): ratio 0.01, weight norms of 0.001 at least, and
    not for the last linear layer.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_rows"})

    ratio: float = 0.01
    """Largest norm of a row's gradient over its weights' norm."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of parameter names."""

    def __post_init__(self) -> None:
        check_value(self.name or "agc", "ratio", self.ratio, 0, 1e6)
        self.targets = checked_texts(self.name or "agc", "targets", self.targets, "*.weight")

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        del history  # it does the same at every step
        yield Action(
            kind="clip_rows",
            values={"ratio": self.ratio},
            targets=self.targets,
            reason="rows by their weights' norm",
        )

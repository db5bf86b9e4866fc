"""What to do where gradients are small: noise, scaling, a higher rate, centralization."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.base import (
    check_flag,
    check_metric,
    check_value,
    checked_texts,
)
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import Array, fingerprint, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = [
    "AnnealedNoise",
    "Centralization",
    "GradientNoise",
    "LearningRateBoost",
    "SmallGradientScaling",
]


@dataclass(kw_only=True)
class SmallGradientPolicy(BoundedPolicy):
    """A policy that acts while the gradient is small.

    The default threshold is that of the `ulysses-pro` preset: the mean over tensors of mean |g|
    below 1e-3. Such a number means something else for each size of model; with `relative` it is
    a share of the median over the run's first `reference` steps. A step that has no value of the
    metric says nothing, and nothing is done at it.
    """

    below: float = 1e-3
    """Where it begins to act."""
    metric: str = "grad/abs_mean/tensor_mean"
    """What is small."""
    relative: bool = False
    """Whether `below` is a share of the metric's median at the start of the run."""
    reference: int = 50
    """Steps that are the start of the run."""
    recovered: float = 1.25
    """It stops acting where the metric is above `below` times this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or type(self).__name__
        check_metric(what, "metric", self.metric)
        check_flag(what, "relative", self.relative)
        check_value(what, "below", self.below, 0, 1 if self.relative else 1e6)
        check_value(what, "reference", self.reference, 1, 10_000, whole=True)
        check_value(what, "recovered", self.recovered, 1, 100, least=True)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (self.metric,)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return super().steps_before_acting + (self.reference if self.relative else 0)

    def _is_small(self, record: StepRecord) -> bool:
        value = record.get(self.metric)
        threshold = self._threshold(value) if math.isfinite(value) else None
        if threshold is None:
            return False
        return self.should_act(value < threshold, value < threshold * self.recovered)

    def _threshold(self, value: float) -> float | None:
        if not self.relative:
            return self.below
        if "start" not in self.memory:
            first = self.memory.setdefault("first", [])
            first.append(value)
            if len(first) >= self.reference:
                self.memory["start"] = statistics.median(self.memory.pop("first"))
            return None
        return float(self.below * self.memory["start"])

    def _read(self, record: StepRecord) -> dict[str, float]:
        return {self.metric: record.get(self.metric)}

    def _why(self, what: str) -> str:
        than = f"{self.below:g} of its start" if self.relative else f"{self.below:g}"
        return f"{self.metric} is below {than}: {what}"


@dataclass(kw_only=True)
class GradientNoise(SmallGradientPolicy):
    """Gaussian noise of a fixed standard deviation while gradients are small.

    Source: the original design of this project, 1e-4 where the mean |g| is below 1e-3; noise of a
    fixed size is the simplest of arXiv:1511.06807 (Neelakantan et al., 2015).
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"add_noise"})

    std: float = 1e-4
    """Standard deviation; with `relative`, as a share of the mean |g| of the step."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of parameter names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "gradient_noise"
        check_value(what, "std", self.std, 0, 1e3)
        self.targets = checked_texts(what, "targets", self.targets, "*.weight")

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (self.metric, *(("grad/abs_mean/total",) if self.relative else ()))

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        unit = record.get("grad/abs_mean/total") if self.relative else 1.0
        if self._is_small(record) and math.isfinite(unit):
            yield Action(
                kind="add_noise",
                values={"std": self.std * unit},
                targets=self.targets,
                reason=self._why("noise"),
                read=self._read(record),
            )


@dataclass(kw_only=True)
class AnnealedNoise(BoundedPolicy):
    """Gaussian noise at every step, of variance ``eta / (1 + t) ** gamma``.

    Source: arXiv:1511.06807 (Neelakantan et al., 2015): gamma 0.55, eta of 0.01, 0.3 or 1.0.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"add_noise"})

    eta: float = 0.01
    """Variance at the first step, t = 0."""
    gamma: float = 0.55
    """How fast it falls."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of parameter names."""
    longest: int = 1 << 53
    """See `BoundedPolicy`; it acts all the time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "annealed_noise"
        check_value(what, "eta", self.eta, 0, 1e3)
        check_value(what, "gamma", self.gamma, 0, 10)
        self.targets = checked_texts(what, "targets", self.targets, "*.weight")

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        step = history[-1].step
        if self.should_act(True, True):
            std = (self.eta / step**self.gamma) ** 0.5
            yield Action(
                kind="add_noise",
                values={"std": std},
                targets=self.targets,
                reason="annealed noise",
            )


@dataclass(kw_only=True)
class SmallGradientScaling(SmallGradientPolicy):
    """Multiplies the gradients of those tensors whose own mean |g| is small.

    Source: the original design of this project: x 1.5 where the mean over tensors is below 1e-3,
    and the tensor's own below 1e-4. With `relative`, a tensor is small by its own start, too.
    Under Adam and AdamW a factor that stays cancels out; one that comes and goes does not.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"scale_each"})

    factor: float = 1.5
    """By which they are multiplied."""
    own_below: float = 1e-4
    """A tensor's own threshold; with `relative`, as a share of its own start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "scale_small"
        check_value(what, "factor", self.factor, 0, 1e3)
        check_value(what, "own_below", self.own_below, 0, 1 if self.relative else 1e6)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (self.metric, "grad/abs_mean/param/*")

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        names, means = parameter_values(record, "grad/abs_mean")
        start = self._own_start(record, names, means)
        if not self._is_small(record) or start is None:
            return
        chosen = np.flatnonzero((means > 0) & (means < self.own_below * start))
        if len(chosen):
            small = [names[i] for i in chosen]
            own = {f"grad/abs_mean/param/{name}" for name in small[:3]}
            yield Action(
                kind="scale_each",
                values=dict.fromkeys(small, self.factor),
                targets=tuple(small),
                reason=self._why(f"{len(small)} small tensors x {self.factor:g}"),
                read=self._read(record) | {name: record[name] for name in sorted(own)},
            )

    def _own_start(
        self, record: StepRecord, names: tuple[str, ...], means: Array
    ) -> Array | float | None:
        """Each tensor's mean over the run's first steps; 1 where thresholds are absolute."""
        if not self.relative:
            return 1.0
        if not names:
            return None
        new = {"tensors": fingerprint(names), "sum": [0.0] * len(names), "steps": 0}
        own = self.memory.setdefault("own", new)
        if own["tensors"] != new["tensors"]:
            return None  # other parameters are trained than at the start
        if "start" not in self.memory and math.isfinite(record.get(self.metric)):
            known = np.where(np.isfinite(means), means, 0.0)
            own |= {"sum": (np.asarray(own["sum"]) + known).tolist(), "steps": own["steps"] + 1}
        return np.asarray(own["sum"], np.float64) / max(1, int(own["steps"]))


@dataclass(kw_only=True)
class LearningRateBoost(SmallGradientPolicy):
    """Raises the learning rate while gradients are small.

    Source: the original design of this project, x 1.2, restored when the gradient recovers.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"lr_factor"})

    factor: float = 1.2
    """On the scheduled rate of every group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name or "lr_boost", "factor", self.factor, 0, 10)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        if self._is_small(record):
            yield Action(
                kind="lr_factor",
                values={"factor": self.factor},
                reason=self._why(f"learning rate x {self.factor:g}"),
                read=self._read(record),
            )


@dataclass(kw_only=True)
class Centralization(SmallGradientPolicy):
    """Takes each row's mean from the gradients of matrices.

    Source: arXiv:2004.01461 (Yong et al., 2020), where it is done at every step: `always`. The
    original design of this project does it while gradients are small.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"centralize"})

    always: bool = False
    """At every step, whatever the gradient's size."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of parameter names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "centralize"
        check_flag(what, "always", self.always)
        self.targets = checked_texts(what, "targets", self.targets, "*.weight")
        idle = [
            field.name
            for field in dataclasses.fields(SmallGradientPolicy)
            if field.init and field.name != "name" and getattr(self, field.name) != field.default
        ]
        if self.always and idle:
            raise InputError(
                f"policy {what}: {idle[0]} means nothing with always; leave one of them out"
            )

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return () if self.always else (self.metric,)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return 0 if self.always else super().steps_before_acting

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        if self.always or self._is_small(record):
            yield Action(
                kind="centralize",
                targets=self.targets,
                reason="always" if self.always else self._why("centralization"),
                read={} if self.always else self._read(record),
            )

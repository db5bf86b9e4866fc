"""Policies for small gradients: scaling, a higher learning rate, centralization."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ulysses_monitor.common.settings import MetricName
from ulysses_monitor.policies.base import Targets
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import Array, fingerprint, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["Centralization", "LearningRateBoost", "SmallGradientPolicy", "SmallGradientScaling"]

Threshold = Annotated[float, Field(gt=0, le=1_000_000)]


@dataclass(kw_only=True)
class SmallGradientPolicy(BoundedPolicy):
    """A policy that acts while the gradient is small.

    The default threshold is that of the `ulysses-pro` preset: a mean over tensors of mean |g| below
    1e-3. What such a number means depends on the size of the model; with `relative`, it is a share
    of the median over the run's first `reference` steps. The policy ignores a step that has no
    value of the metric.
    """

    below: Threshold = 1e-3
    """Threshold below which the policy starts to act."""
    metric: MetricName = "grad/abs_mean/tensor_mean"
    """The metric that is compared with the threshold."""
    relative: bool = False
    """Whether `below` is a share of the metric's median at the start of the run."""
    reference: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Number of steps that count as the start of the run."""
    recovered: Annotated[float, Field(ge=1, le=100)] = 1.25
    """The policy stops acting once the metric is above `below` times this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("below")

    def _check_share(self, setting: str) -> None:
        value = getattr(self, setting)
        if self.relative and value > 1:
            raise self._refusal(
                f"{setting} is {value!r}; expected a number above 0 and at most 1 with relative"
            )

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

    def _reason(self, response: str) -> str:
        unit = " times its value at the start" if self.relative else ""
        return f"{self.metric} is below {self.below:g}{unit}: {response}"


@dataclass(kw_only=True)
class SmallGradientScaling(SmallGradientPolicy):
    """Multiplies the gradients of the tensors whose own mean |g| is small.

    Source: the original design of this project: x 1.5 where the mean over tensors is below 1e-3
    and the tensor's own mean below 1e-4. With `relative`, each tensor is also compared with its own
    start. Under Adam and AdamW a constant factor cancels out; one that comes and goes does not.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"scale_each"})

    factor: Annotated[float, Field(gt=0, le=1000)] = 1.5
    """Factor on the small gradients."""
    own_below: Threshold = 1e-4
    """Threshold of a tensor's own mean; with `relative`, a share of the tensor's own start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("own_below")

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (self.metric, "grad/abs_mean/param/*")

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        names, means = parameter_values(record, "grad/abs_mean")
        start = self._start_of_each(record, names, means)
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
                reason=self._reason(f"{len(small)} small tensors x {self.factor:g}"),
                read=self._read(record) | {name: record[name] for name in sorted(own)},
            )

    def _start_of_each(
        self, record: StepRecord, names: tuple[str, ...], means: Array
    ) -> Array | float | None:
        """Returns each tensor's mean over the run's first steps [P]; 1 for absolute thresholds."""
        if not self.relative:
            return 1.0
        if not names:
            return None
        new = {"tensors": fingerprint(names), "sum": [0.0] * len(names), "steps": 0}
        own = self.memory.setdefault("own", new)
        if own["tensors"] != new["tensors"]:
            return None  # the run trains other parameters than at its start
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

    factor: Annotated[float, Field(gt=0, le=10)] = 1.2
    """Factor on the scheduled rate of every group."""

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        if self._is_small(record):
            yield Action(
                kind="lr_factor",
                values={"factor": self.factor},
                reason=self._reason(f"learning rate x {self.factor:g}"),
                read=self._read(record),
            )


@dataclass(kw_only=True)
class Centralization(SmallGradientPolicy):
    """Subtracts each row's mean from the gradients of matrices.

    Source: arXiv:2004.01461 (Yong et al., 2020), which centralizes at every step: `always`. The
    original design of this project centralizes while gradients are small.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"centralize"})

    always: bool = False
    """Whether to centralize at every step, whatever the gradient's size."""
    targets: Targets = ("*",)
    """Patterns of parameter names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = [
            field.name
            for field in dataclasses.fields(SmallGradientPolicy)
            if field.init and field.name != "name" and getattr(self, field.name) != field.default
        ]
        if self.always and unused:
            raise self._refusal(f"{unused[0]} has no effect with always; remove one of them")

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
                reason="centralized at every step" if self.always else self._reason("centralized"),
                read={} if self.always else self._read(record),
            )

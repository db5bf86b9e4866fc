"""Gaussian noise on gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from ulysses_monitor.policies.base import Targets
from ulysses_monitor.policies.bounds import UNLIMITED, BoundedPolicy
from ulysses_monitor.policies.small_gradients import SmallGradientPolicy
from ulysses_monitor.records import Action, StepRecord

__all__ = ["AnnealedNoise", "GradientNoise"]

_MEAN = "grad/abs_mean/total"


@dataclass(kw_only=True)
class GradientNoise(SmallGradientPolicy):
    """Adds Gaussian noise of a fixed standard deviation while gradients are small.

    Source: the original design of this project, 1e-4 where the mean |g| is below 1e-3; noise of a
    fixed size is the simplest of arXiv:1511.06807 (Neelakantan et al., 2015).
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"add_noise"})

    std: Annotated[float, Field(gt=0, le=1000)] = 1e-4
    """Standard deviation; with `relative`, a share of the step's mean |g|."""
    targets: Targets = ("*",)
    """Patterns of parameter names."""

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (self.metric, _MEAN) if self.relative else (self.metric,)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        unit = record.get(_MEAN) if self.relative else 1.0
        if self._is_small(record) and math.isfinite(unit):
            yield Action(
                kind="add_noise",
                values={"std": self.std * unit},
                targets=self.targets,
                reason=self._reason("noise added"),
                read=self._read(record),
            )


@dataclass(kw_only=True)
class AnnealedNoise(BoundedPolicy):
    """Adds Gaussian noise at every step, of variance ``eta / (1 + t) ** gamma``.

    Source: arXiv:1511.06807 (Neelakantan et al., 2015): gamma 0.55, eta of 0.01, 0.3 or 1.0.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"add_noise"})

    eta: Annotated[float, Field(gt=0, le=1000)] = 0.01
    """Variance at the first step, t = 0."""
    gamma: Annotated[float, Field(gt=0, le=10)] = 0.55
    """How fast the variance falls."""
    targets: Targets = ("*",)
    """Patterns of parameter names."""
    longest: Annotated[int, Field(ge=1)] = UNLIMITED
    """See `BoundedPolicy`; by default the noise never pauses."""

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

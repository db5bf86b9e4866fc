"""Rules that compare a step with those before it; none fires on a healthy start of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.settings import MetricName, Text
from ulysses_monitor.records import Alert, StepRecord, column
from ulysses_monitor.rules.base import HISTORY
from ulysses_monitor.rules.builtin import BuiltinRule

__all__ = ["LoraImbalance", "Spike", "VanishingGradient"]

Steps = Annotated[int, Field(ge=1, le=HISTORY - 1)]
"""A number of earlier steps, as many as the history can hold."""


@dataclass(frozen=True, kw_only=True)
class Spike(BuiltinRule):
    """Finds a value above mean + `sigmas` standard deviations of the last `window` steps.

    Source: OLMo-core's SkipStep (6 standard deviations over 128 steps).
    """

    metric: MetricName
    """The metric to watch."""
    name: Text = "spike"
    sigmas: Annotated[float, Field(gt=0, le=1_000_000)] = 6.0
    """Standard deviations above the mean at which a value is a spike."""
    window: Steps = 128
    """Number of earlier steps that the newest is compared with."""
    warmup: Steps = 64
    """Steps that must have passed before any value is a spike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup > self.window:
            raise InputError(
                f"rule {self.name}: warmup is {self.warmup}; expected at most window, which is "
                f"{self.window}, or the rule can never fire"
            )

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        past = column(history[-self.window - 1 : -1], self.metric)
        past = past[np.isfinite(past)]
        value = history[-1].get(self.metric)
        if len(past) < self.warmup or not math.isfinite(value):
            return []
        threshold = float(past.mean() + self.sigmas * past.std())
        if value <= threshold:
            return []
        where = f", most in {_worst_layer(history[-1])}" if self.metric == "grad/norm/total" else ""
        times = value / float(past.mean())
        message = (
            f"Step {history[-1].step}: {self.metric} is {value:.4g}, "
            f"{times:.1f} times its mean over the last {len(past)} steps{where}."
        )
        return [
            Alert(
                rule=self.name,
                step=history[-1].step,
                metric=self.metric,
                value=value,
                threshold=threshold,
                message=message,
                hint="Look at this step's batch; clip at a lower norm, or warm up for longer.",
            )
        ]


@dataclass(frozen=True, kw_only=True)
class VanishingGradient(BuiltinRule):
    """Finds a gradient norm that stays far below its median over the first steps of the history.

    The threshold is relative to the run itself: an absolute threshold on the mean gradient fires on
    healthy runs of large models.
    """

    name: Text = "vanishing_gradient"
    metric: MetricName = "grad/norm/total"
    """The metric to watch."""
    below: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Share of the median below which the gradient has vanished."""
    reference: Steps = 32
    """Number of the oldest steps of the history that give the median."""
    patience: Steps = 10
    """Consecutive steps that must be below the threshold."""

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        values = column(history, self.metric)
        first = values[: self.reference]
        if len(values) < self.reference + self.patience or np.isnan(first).all():
            return []
        threshold = self.below * float(np.nanmedian(first))
        recent = values[-self.patience :]
        broken = column(history, "grad/nonfinite/total")[-self.patience :] > 0
        if not (recent < threshold).all() or broken.any():  # the norm leaves NaN out
            return []
        record = history[-1]
        return [
            Alert(
                rule=self.name,
                step=record.step,
                metric=self.metric,
                value=float(recent[-1]),
                threshold=threshold,
                message=f"Step {record.step}: the gradient norm has been below {threshold:.3g} "
                f"for {self.patience} steps.",
                hint="Check that the loss depends on the trained parameters and that they are not "
                "frozen; raise the learning rate.",
            )
        ]


@dataclass(frozen=True, kw_only=True)
class LoraImbalance(BuiltinRule):
    """Finds adapters of which one side gets almost all of the gradient, for `patience` steps.

    The ratio is infinite at the first step, where B = 0 keeps A's gradient at zero, and falls over
    about a hundred steps on a healthy run; so the rule waits for `warmup` steps.
    """

    name: Text = "lora_imbalance"
    metric: MetricName = "lora/grad_ratio_B_A/total"
    """The ratio of B's gradient norm to A's."""
    low: Annotated[float, Field(gt=0)] = 0.02
    """A ratio below this is out of balance."""
    high: Annotated[float, Field(gt=0)] = 50.0
    """A ratio above this is out of balance."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Steps that the rule waits for."""
    patience: Steps = 20
    """Consecutive steps that must be out of balance on the same side."""

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        record = history[-1]
        recent = column(history[-self.patience :], self.metric)
        if record.step <= self.warmup or len(recent) < self.patience or np.isnan(recent).any():
            return []
        low, high = bool((recent < self.low).all()), bool((recent > self.high).all())
        if not (low or high):
            return []
        side = "A" if high else "B"
        return [
            Alert(
                rule=self.name,
                step=record.step,
                metric=self.metric,
                value=float(recent[-1]),
                threshold=self.high if high else self.low,
                message=f"Step {record.step}: LoRA's {side} has had almost no gradient for "
                f"{self.patience} steps (B/A is {recent[-1]:.3g}).",
                hint="Try LoRA+ (a higher rate for B), another initialisation, or a higher rate.",
            )
        ]


def _worst_layer(record: StepRecord) -> str:
    names = record.schema.match("grad/norm/layer/*")
    return max(names, key=lambda n: record[n]).removeprefix("grad/norm/") if names else "no layer"

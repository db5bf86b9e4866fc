"""The learning rate, and the clipping of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field

from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.settings import list_as_tuple
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History

__all__ = ["AlwaysClipping", "OffSchedule", "RateJump", "RateRange", "RateReset", "RateZero"]

RATE = "optim/lr/0"
RATES = "optim/lr/*"
OFF = "optim/lr_off_schedule/0"
CLIP = "grad/clip_coef/total"
SECOND = "optim/exp_avg_sq_mean/total"
LORA = "lora/grad_ratio_B_A/total"

_Range = Annotated[
    tuple[float, float],
    BeforeValidator(list_as_tuple),
    Expected("the lowest and the highest rate, such as [1e-7, 0.02]"),
]


@dataclass(frozen=True, kw_only=True)
class RateZero(BuiltinRule):
    """Finds a learning rate of zero in every group, after the first steps."""

    tables = (RATES,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        _, rows = history.table(RATES)
        if rows[-1].any():
            return []
        text = "the learning rate is 0 in every group"
        return [self.alert(history, RATE, 0.0, 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class RateJump(BuiltinRule):
    """Finds a learning rate that leaps upwards from one step to the next."""

    times: Annotated[float, Field(gt=1)] = 3.0
    """How many times the rate of the step before."""
    after: Annotated[int, Field(ge=1)] = 10
    """Steps of a warm-up, whose first steps leap."""
    reads = (RATE,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.after + 1

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if len(history) <= self.after:
            return []
        before, rate = history[-2].get(RATE), history.last(RATE)
        if not (before > 0 and rate > self.times * before):
            return []
        text = f"the learning rate leapt from {before:.3g} to {rate:.3g}"
        return [self.alert(history, RATE, rate, self.times * before, text)]


@dataclass(frozen=True, kw_only=True)
class RateReset(BuiltinRule):
    """Finds a warm-up after a resume: a run that begins behind its first step, at a rising rate."""

    steps: Annotated[int, Field(ge=3, le=64)] = 6
    """Steps over which the rate must rise."""
    times: Annotated[float, Field(gt=1)] = 1.5
    """How much it must rise over them."""
    reads = (RATE,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        first = history[0].step
        if first == 1 or len(history) != self.steps:
            return []
        rates = history.samples(RATE)
        if len(rates) < self.steps or not (np.diff(rates) > 0).all():
            return []
        rose = float(rates[-1] / rates[0]) if rates[0] > 0 else np.inf
        if rose < self.times:
            return []
        text = (
            f"the run was resumed at step {first}, and the learning rate warms up again "
            f"({rates[0]:.2g} to {rates[-1]:.2g})"
        )
        return [self.alert(history, RATE, float(rates[-1]), self.times * float(rates[0]), text)]


@dataclass(frozen=True, kw_only=True)
class OffSchedule(BuiltinRule):
    """Finds a rate that is not the one of the schedule that the Trainer's arguments name."""

    by: Annotated[float, Field(gt=0)] = 0.1
    """How far it is away, as a share of the schedule's highest rate."""
    reads = (OFF,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        away = history.last(OFF)
        if not abs(away) > self.by:
            return []
        side = "above" if away > 0 else "below"
        text = (
            "the learning rate is not on the schedule that the training's arguments name: it is "
            f"{side} it by {abs(away):.0%} of the highest rate"
        )
        return [self.alert(history, OFF, away, math.copysign(self.by, away), text)]


@dataclass(frozen=True, kw_only=True)
class RateRange(BuiltinRule):
    """Finds a rate far outside what Adam is used with, for adapters or for all weights."""

    lora: _Range = (1e-7, 2e-2)
    """Lowest and highest rate of a training with LoRA."""
    full: _Range = (1e-9, 2e-2)
    """Lowest and highest rate of other trainings."""
    reads = (SECOND, RATE, LORA)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (SECOND, RATE)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (SECOND,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        has_adapters = LORA in history[-1]
        low, high = self.lora if has_adapters else self.full
        rate, largest = history.last(RATE), history.highest(RATE)
        if low <= largest <= high or not rate > 0:
            return []
        limit = low if largest < low else high
        what = "LoRA" if has_adapters else "training all weights"
        text = f"a learning rate of {rate:.3g} is far from the {low:.0e} to {high:.0e} of {what}"
        return [self.alert(history, RATE, rate, limit, text)]


@dataclass(frozen=True, kw_only=True)
class AlwaysClipping(BuiltinRule):
    """Finds clipping that cuts nearly every step to a small part."""

    below: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Median of the factor that clipping multiplies by."""
    window: Steps = 64
    """Number of steps, at all of which gradients were clipped."""
    reads = (CLIP,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.window + 1

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.window

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        usual = history.baseline(CLIP, self.window)
        if not usual.median < self.below or usual.size < self.window or usual.largest >= 1:
            return []
        text = (
            f"each of the last {self.window} steps was clipped, to {usual.median:.2g} of its "
            "gradient at the median"
        )
        return [self.alert(history, CLIP, usual.median, self.below, text)]

"""Change points: a number that leaves its usual course before the loss does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ulysses_monitor.common.settings import MetricName
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History, median_of

__all__ = ["Cusum"]

LOSS = "train/loss/total"


@dataclass(frozen=True, kw_only=True)
class Cusum(BuiltinRule):
    """Finds a lasting rise of a positive number, by the cumulative sum of its logarithm.

    Source: Page, Continuous inspection schemes, Biometrika 1954.
    """

    metric: MetricName
    """The metric to watch."""
    allowance: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviations that a value may be above the median without adding to the sum."""
    limit: Annotated[float, Field(gt=0)] = 15.0
    """Sum, in standard deviations, at which the course has changed."""
    times: Annotated[float, Field(ge=1)] = 1.5
    """The newest values must be so many times the usual."""
    reference: Steps = 64
    """Number of values that say what is usual."""
    window: Annotated[int, Field(ge=4, le=96)] = 24
    """Newest values that are summed."""
    least: Steps = 24
    """Number of values that must be known to say what is usual."""
    gain: Annotated[float, Field(ge=0, le=1)] = 0.01
    """A loss that falls by this share over 24 steps is of a training that learns."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric, LOSS)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (self.metric,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value = history.last(self.metric)
        usual = history.baseline(self.metric, self.reference, self.window)
        if (
            not value > self.times * usual.median
            or usual.size < self.least
            or math.isnan(usual.spread)
        ):
            return []
        recent = history.samples(self.metric)[-self.window :]
        if recent.min() <= 0 or self._learns(history):
            return []
        spread = max(usual.spread, 0.05)
        above = np.log(recent / usual.median) / spread - self.allowance
        sums = np.concatenate([[0.0], np.cumsum(above)])
        score = float(sums[-1] - sums.min())
        level = median_of(recent[-4:]) / usual.median
        if score < self.limit or level < self.times:
            return []
        since = history[-1].step - int(len(sums) - 1 - sums.argmin()) + 1
        text = (
            f"{self.metric} has been rising since about step {since}: it is {level:.2g} times its "
            f"usual {usual.median:.3g} (score {score:.0f})"
        )
        return [self.alert(history, self.metric, value, self.limit, text)]

    def _learns(self, history: History) -> bool:
        losses = history.samples(LOSS)
        before, now = median_of(losses[-32:-8]), median_of(losses[-8:])
        return now < before - self.gain * abs(before)

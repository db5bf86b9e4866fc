"""Values that are far above what was usual just before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ulysses_monitor.common.settings import MetricName, Text
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History

__all__ = ["Outlier", "Spike"]

_Times = Annotated[float, Field(ge=1, le=1_000_000)]
_Sigmas = Annotated[float, Field(gt=0, le=1_000_000)]
_LAYERS = "grad/norm/layer/"


@dataclass(frozen=True, kw_only=True)
class Spike(BuiltinRule):
    """Finds a value far above all of the last `window`, measured on the logarithm.

    The logarithm, because norms and losses are skewed; medians, because a spike in the window must
    not hide the next one; the scatter from step to step, because losses fall.
    """

    metric: MetricName
    """The metric to watch."""
    name: Text = "spike"
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 32
    """Steps that must have been seen before a value is a spike."""
    sigmas: _Sigmas = 6.0
    """Robust standard deviations of the logarithm, above the median, at which it is a spike."""
    times: _Times = 2.0
    """A spike is at least so many times the median."""
    margin: _Times = 1.25
    """A spike is at least so many times the largest value of the window."""
    window: Steps = 64
    """Number of earlier steps that the newest is compared with."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return min(self.warmup, self.window) + 1

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value = history.last(self.metric)
        size, median, spread, largest = history.baseline(self.metric, self.window)
        if (
            not value > self.times * median
            or size < min(self.warmup, self.window)
            or not value < math.inf
        ):
            return []
        if math.isnan(spread):  # some values are not positive: there is no logarithm
            return []
        limit = max(self.times * median, median * _exp(self.sigmas * spread), self.margin * largest)
        if not value > limit:
            return []
        where = _worst_layer(history) if self.metric == "grad/norm/total" else ""
        text = (
            f"{self.metric} is {value:.4g}, {value / median:.3g} times its median over the last "
            f"{size} steps{f', most in {where}' if where else ''}"
        )
        return [self.alert(history, self.metric, value, limit, text, where=where)]


@dataclass(frozen=True, kw_only=True)
class Outlier(BuiltinRule):
    """Finds a value, of any sign, far from the values before it."""

    metric: MetricName
    """The metric to watch."""
    sigmas: _Sigmas = 10.0
    """Distance from the mean of the window, in its standard deviations."""
    window: Steps = 64
    """Number of earlier values."""
    least: Steps = 20
    """Earlier values that there must be."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.least + 1

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value, usual = history.last(self.metric), history.baseline(self.metric, self.window)
        if usual.size < self.least or not abs(value - usual.median) > usual.largest - usual.median:
            return []  # no further away than the largest value
        past = history.samples(self.metric)[:-1][-self.window :]
        mean = float(past.mean())
        limit = self.sigmas * float(past.std())
        if not abs(value - mean) > limit or limit == 0:
            return []
        known = f"{mean:.4g} +- {limit / self.sigmas:.2g}"
        text = f"{self.metric} is {value:.4g}, far from its usual {known}"
        return [
            self.alert(history, self.metric, value, mean + math.copysign(limit, value - mean), text)
        ]


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _worst_layer(history: History) -> str:
    record = history[-1]
    names = record.schema.match(f"{_LAYERS}*")
    worst = max(names, key=lambda name: record[name], default="")
    return worst.removeprefix("grad/norm/")

"""Values beyond a limit, or far from where the run began."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import BeforeValidator, Field

from ulysses_monitor.common.settings import MetricName, Text, list_as_tuple
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History, median_of

__all__ = ["Climb", "Constant", "Drift", "Grown", "Level", "MetricNames", "Surge", "Vanishing"]

MetricNames = Annotated[tuple[MetricName, ...], BeforeValidator(list_as_tuple), Field(min_length=1)]
"""Names that trainers give to one number; a record has one of them."""

_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class _Alternatives(BuiltinRule):
    """Base of rules about a number that has another name in each trainer."""

    metrics: MetricNames
    """The metric to watch; of several, those that a record has."""
    alternatives = True

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return self.metrics

    def _known(self, history: History) -> Iterator[tuple[str, float]]:
        for metric in self.metrics:
            value = history.last(metric)
            if math.isfinite(value):
                yield metric, value


@dataclass(frozen=True, kw_only=True)
class Level(_Alternatives):
    """Finds a value beyond a fixed limit."""

    above: float | None = None
    """A value above this is wrong."""
    below: float | None = None
    """A value below this is wrong."""

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        found = []
        for metric, value in self._known(history):
            if self.above is not None and value > self.above:
                found.append(self._say(history, metric, value, self.above, "above"))
            elif self.below is not None and value < self.below:
                found.append(self._say(history, metric, value, self.below, "below"))
        return found

    def _say(self, history: History, metric: str, value: float, limit: float, side: str) -> Alert:
        text = f"{metric} is {value:.4g}, {side} {limit:.4g}"
        return self.alert(history, metric, value, limit, text)


@dataclass(frozen=True, kw_only=True)
class Drift(_Alternatives):
    """Finds a value that moved away from where the run began, by a factor."""

    rise: _Factor | None = None
    """A value above this many times the start is wrong."""
    fall: _Factor | None = None
    """A value below this share of the start is wrong."""
    reference: Steps = 8
    """Number of the oldest values whose median is the start."""
    least: float = 0.0
    """A rise counts only above this value."""

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.reference

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        found = []
        for metric, value in self._known(history):
            start = history.start(metric, self.reference)
            if not start > 0:
                continue
            if self.rise is not None and value > max(self.rise * start, self.least):
                found.append(self._say(history, metric, value, start, self.rise))
            elif self.fall is not None and value < self.fall * start:
                found.append(self._say(history, metric, value, start, self.fall))
        return found

    def _say(self, history: History, metric: str, value: float, start: float, by: float) -> Alert:
        text = f"{metric} is {value:.4g}, {value / start:.3g} times its start of {start:.4g}"
        return self.alert(history, metric, value, by * start, text)


@dataclass(frozen=True, kw_only=True)
class Surge(_Alternatives):
    """Finds a value that is many times what was usual: more than a steady growth from 0 gives."""

    times: _Factor = 5.0
    """Multiple of the median of the values before; a line from 0 is at 2."""
    least: float = 0.0
    """A value counts only above this."""
    window: Steps = 64
    """Number of values before."""

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 9

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        found = []
        for metric, value in self._known(history):
            usual = history.baseline(metric, self.window)
            limit = max(self.times * usual.median, self.least)
            if usual.size >= 8 and value > limit:
                text = f"{metric} is {value:.4g}, usually {usual.median:.4g}"
                found.append(self.alert(history, metric, value, limit, text))
        return found


@dataclass(frozen=True, kw_only=True)
class Climb(_Alternatives):
    """Finds a value that climbs slowly for very long and does not level off."""

    times: Annotated[float, Field(gt=1)] = 1.15
    """By how much each quarter of the window, its median, is above the one before."""
    least: float = 0.0
    """A value counts only above this."""
    window: Annotated[int, Field(ge=8, le=240)] = 128
    """Number of values."""

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.window

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.window

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        found = []
        for metric, value in self._known(history):
            if not value > max(self.least, history.baseline(metric, self.window).median):
                continue
            recent = history.samples(metric)[-self.window :]
            if len(recent) < self.window:
                continue
            part = self.window // 4
            first, *rest, last = (median_of(recent[i * part : (i + 1) * part]) for i in range(4))
            if all(b > self.times * a > 0 for a, b in pairwise([first, *rest, last])):
                text = (
                    f"{metric} has climbed for {self.window} values without levelling off, from "
                    f"{first:.3g} to {last:.3g}"
                )
                found.append(self.alert(history, metric, value, self.times * rest[-1], text))
        return found


@dataclass(frozen=True, kw_only=True)
class Constant(_Alternatives):
    """Finds a number that is the same, bit for bit, at many steps in a row."""

    steps: Steps = 10
    """Number of values that are equal."""

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
        found = []
        for metric, value in self._known(history):
            recent = history.samples(metric)[-self.steps :]
            if len(recent) == self.steps and (recent == value).all():
                text = f"{metric} has been exactly {value:.6g} for {self.steps} values"
                found.append(self.alert(history, metric, value, value, text))
        return found


@dataclass(frozen=True, kw_only=True)
class Vanishing(BuiltinRule):
    """Finds a gradient norm that stays far below its median over the first steps of the history.

    The threshold is relative to the run itself: an absolute threshold on the mean gradient fires on
    healthy runs of large models.
    """

    name: Text = "vanishing_gradient"
    patience: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    metric: MetricName = "grad/norm/total"
    """The metric to watch."""
    below: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Share of the median below which the gradient has vanished."""
    reference: Steps = 32
    """Number of the oldest steps of the history that give the median."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric, "grad/nonfinite/total")

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (self.metric,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.reference

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value = history.last(self.metric)
        limit = self.below * history.start(self.metric, self.reference)
        if not value < limit or history.last("grad/nonfinite/total") > 0:  # the norm leaves NaN out
            return []
        text = f"the gradient norm has been below {limit:.3g} for {self.patience} steps"
        return [self.alert(history, self.metric, value, limit, text)]


@dataclass(frozen=True, kw_only=True)
class Grown(BuiltinRule):
    """Finds a number that rises, or falls, at almost every step, which noise does not allow."""

    metric: MetricName = "grad/norm/total"
    """The metric to watch."""
    times: _Factor = 3.0
    """It must be so many times the median of its first eight values, or that so many times it."""
    falls: bool = False
    """Whether it falls."""
    rising: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the last `window` steps at which it rose, or fell."""
    window: Steps = 24
    """Number of steps."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric,)

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
        value, start = history.last(self.metric), history.start(self.metric, 8)
        low, high = (value, start) if self.falls else (start, value)
        if not high > self.times * low > 0:
            return []
        recent = history.samples(self.metric)[-self.window - 1 :]
        went = recent[1:] < recent[:-1] if self.falls else recent[1:] > recent[:-1]
        if len(went) < self.window or (share := float(went.mean())) < self.rising:
            return []
        text = (
            f"{self.metric} {'fell' if self.falls else 'rose'} at {share:.0%} of the last "
            f"{self.window} steps; it is {value:.4g} and began at {start:.4g}"
        )
        return [self.alert(history, self.metric, value, start, text)]

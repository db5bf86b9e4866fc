"""Speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ulysses_monitor.common.settings import MetricName
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History

__all__ = ["MemoryCreep", "SlowDown", "Stall"]

SPEED = "train/tokens_per_second/total"
SECONDS = "train/step_seconds/total"

_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class SlowDown(BuiltinRule):
    """Finds a speed that stays far below what it was."""

    below: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the usual speed."""
    window: Steps = 128
    """Number of steps that say what is usual."""
    skip: Annotated[int, Field(ge=0, le=128)] = 32
    """Newest steps that do not."""
    least_seconds: Annotated[float, Field(ge=0)] = 0.2
    """Steps that usually take less are not looked at."""
    reads = (SPEED, SECONDS)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 32 + self.skip

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        usual = history.baseline(SPEED, self.window, self.skip)
        value, limit = history.last(SPEED), self.below * usual.median
        if not value < limit or usual.size < 32:
            return []
        if history.baseline(SECONDS, self.window, self.skip).median < self.least_seconds:
            return []
        text = f"the speed is {value:.4g} tokens a second, usually {usual.median:.4g}"
        return [self.alert(history, SPEED, value, limit, text)]


@dataclass(frozen=True, kw_only=True)
class Stall(BuiltinRule):
    """Finds one step that took far longer than usual."""

    times: _Factor = 20.0
    """How many times the usual duration."""
    least_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Shorter steps are no stall."""
    reads = (SECONDS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 9

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value = history.last(SECONDS)
        if not value > self.least_seconds:
            return []
        usual = history.baseline(SECONDS, 64)
        limit = self.times * usual.median
        if usual.size < 8 or not value > limit:
            return []
        text = f"the step took {value:.0f} s, usually {usual.median:.2g} s"
        return [self.alert(history, SECONDS, value, limit, text)]


@dataclass(frozen=True, kw_only=True)
class MemoryCreep(BuiltinRule):
    """Finds memory that keeps growing long after the start."""

    metric: MetricName = "system/host_memory_bytes/total"
    """The metric to watch."""
    times: Annotated[float, Field(gt=1)] = 1.3
    """How much it must have grown over the history."""
    least_bytes: Annotated[float, Field(ge=0)] = 1e9
    """By how much it must have grown at least."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 128

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return 128

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value, start = history.last(self.metric), history.start(self.metric, 16)
        limit = max(self.times * start, start + self.least_bytes)
        if not value > limit or len(history) < 128:
            return []
        levels = history.samples(self.metric)[::16]
        if (np.diff(levels) > 0).mean() < 0.9:
            return []
        text = (
            f"{self.metric} has grown from {start / 1e9:.2f} to {value / 1e9:.2f} GB over "
            f"{len(history)} steps, and nearly all the time"
        )
        return [self.alert(history, self.metric, value, limit, text)]

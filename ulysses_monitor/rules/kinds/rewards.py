"""Reinforcement learning and preferences: numbers that only mean something together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps, Words, name_some
from ulysses_monitor.rules.history import Array, History, median_of
from ulysses_monitor.rules.kinds.levels import MetricNames

__all__ = ["Divided", "Fallen", "FormatHacking", "LengthHacking"]

REWARDS = "train/rewards/*/mean/total"


@dataclass(frozen=True, kw_only=True)
class LengthHacking(BuiltinRule):
    """Finds answers that become much longer, or shorter, while the reward rises with them."""

    length: MetricNames = ("train/completions/mean_length/total", "train/response_length/total")
    """Mean length of the answers; the first one that a record has."""
    reward: MetricNames = ("train/reward/total", "train/objective/scores/total")
    """The reward; the first one that a record has."""
    times: Annotated[float, Field(gt=1)] = 2.0
    """How many times longer they are than at the start."""
    related: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Correlation of length and reward over the last `window` values."""
    window: Steps = 32
    """Number of values."""
    reference: Steps = 8
    """Number of the oldest values that say what the start was."""
    alternatives = True

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (*self.length, *self.reward)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return max(8, self.reference)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        for length in self.length:
            value, start = history.last(length), history.start(length, self.reference)
            if value > self.times * start > 0:
                return self._compare(history, length, value, start)
        return []

    def _compare(self, history: History, length: str, value: float, start: float) -> list[Alert]:
        for reward in self.reward:
            both = np.array([history.column(length), history.column(reward)])
            both = both[:, np.isfinite(both).all(axis=0)][:, -self.window :]
            if both.shape[1] < 8 or (both.std(axis=1) == 0).any():
                continue
            related = float(np.corrcoef(both)[0, 1])
            if related < self.related:
                continue
            text = (
                f"answers are {value / start:.1f} times as long as at the start ({value:.4g}), and "
                f"{reward} goes with their length (correlation {related:.2f})"
            )
            return [self.alert(history, length, value, self.times * start, text)]
        return []


@dataclass(frozen=True, kw_only=True)
class Fallen(BuiltinRule):
    """Finds a number that has lost most of the best it had."""

    metrics: MetricNames
    """The metric to watch; of several, those that a record has."""
    lost: Annotated[float, Field(gt=0)] = 0.7
    """Share of what it had gained since the start that it has lost again."""
    sigmas: Annotated[float, Field(gt=0)] = 4.0
    """The loss must be so many standard deviations of the newest values."""
    window: Steps = 8
    """Number of values of which means are taken."""
    alternatives = True

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return self.metrics

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 4 * self.window

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        found = []
        for metric in self.metrics:
            # Most values are not below the start and below what was usual: no need to look closer.
            usual = max(history.baseline(metric, 64).median, history.start(metric, 8))
            if not history.last(metric) < usual:
                continue
            values = history.samples(metric)
            if len(values) < 4 * self.window:
                continue
            blocks = values[len(values) % self.window :].reshape(-1, self.window)
            means, noise = blocks.mean(axis=1), median_of(blocks.std(axis=1))
            best, now = float(means[:-1].max()), float(means[-1])
            limit = best - max(self.lost * (best - float(means[0])), self.sigmas * noise)
            if now < limit and best > float(means[0]):
                text = f"{metric} has fallen to {now:.4g}; its best was {best:.4g}"
                found.append(self.alert(history, metric, now, limit, text))
        return found


@dataclass(frozen=True, kw_only=True)
class Divided(BuiltinRule):
    """Finds one reward function that rises while another one falls."""

    sigmas: Annotated[float, Field(gt=0)] = 4.0
    """How far each has moved from its start, in standard deviations of its first values."""
    reference: Steps = 16
    """Number of the oldest values that say what the start was."""
    tables = (REWARDS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.reference + 8

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, kept = history.table(REWARDS)
        if len(names) < 2 or len(kept) < self.reference + 8:
            return []
        rows = np.array(kept)
        first, newest = rows[: self.reference], rows[-8:].mean(axis=0)
        moved = (newest - first.mean(axis=0)) / _spread(first)
        up, down = np.flatnonzero(moved > self.sigmas), np.flatnonzero(moved < -self.sigmas)
        if not (len(up) and len(down)):
            return []
        rising, falling = (name_some(_short(names[i]) for i in which) for which in (up, down))
        text = f"the reward of {rising} has risen while that of {falling} has fallen"
        worst = names[down[0]]
        limit = float(first[:, down[0]].mean())
        return [self.alert(history, worst, float(newest[down[0]]), limit, text, where=falling)]


@dataclass(frozen=True, kw_only=True)
class FormatHacking(BuiltinRule):
    """Finds a reward for the form of answers that is at its top while no other one has risen."""

    formats: Words = ("format", "xml", "tag", "json", "style")
    """Parts of the names of reward functions that look at the form."""
    aside: Words = ("length", "penalty", "repetition")
    """Parts of the names of reward functions that do not say whether an answer is right."""
    sigmas: Annotated[float, Field(gt=0)] = 2.0
    """How far the first has risen, in standard deviations of its first values; 5 standard errors
    of the difference of the means."""
    risen: Annotated[float, Field(gt=0)] = 0.5
    """How far another one may have risen, in the same measure."""
    reference: Steps = 8
    """Number of the oldest values that say what the start was."""
    window: Annotated[int, Field(ge=2, le=128)] = 32
    """Number of values for which the first has been near its top."""
    top: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of its highest value that is near its top."""
    tables = (REWARDS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.reference + self.window

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.window

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, kept = history.table(REWARDS)
        if len(names) < 2 or len(kept) < self.values_needed:
            return []
        form = np.array([_has_part(name, self.formats) for name in names])
        goal = ~form & np.array([not _has_part(name, self.aside) for name in names])
        rows = np.array(kept)
        first, recent = rows[: self.reference], rows[-self.window :]
        goal &= ~((first.std(axis=0) == 0) & (first[0] > 0))  # it is reached from the start
        if not (form.any() and goal.any() and np.isfinite(rows[:, form | goal]).all()):
            return []
        moved = (recent.mean(axis=0) - first.mean(axis=0)) / _spread(first)
        is_at_top = np.median(recent[: self.window // 2], axis=0) >= self.top * rows.max(axis=0)
        hacked = np.flatnonzero(form & is_at_top & (moved > self.sigmas))
        if not len(hacked) or (moved[goal] > self.risen).any():
            return []
        best, others = names[hacked[0]], name_some(_short(names[i]) for i in np.flatnonzero(goal))
        value = float(recent[:, hacked[0]].mean())
        text = (
            f"the reward of {_short(best)} has risen to {value:.4g}, its top, while that of "
            f"{others} has not risen in {self.window} logs"
        )
        limit = float(first[:, hacked[0]].mean())
        return [self.alert(history, best, value, limit, text, where=others)]


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    short = _short(name).lower()
    return any(part.lower() in short for part in parts)


def _spread(first: Array) -> Array:
    """Returns what a move is measured in: the scatter of the first values, column by column."""
    found: Array = np.maximum(first.std(axis=0), 0.02 * np.abs(first).max(axis=0) + 1e-6)
    return found


def _short(name: str) -> str:
    return name.removeprefix("train/rewards/").removesuffix("/mean/total")

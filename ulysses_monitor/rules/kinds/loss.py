"""How the loss moves over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History, median_of

__all__ = [
    "Collapse",
    "Divergence",
    "NotLearning",
    "Plateau",
    "Rise",
]

LOSS = "train/loss/total"
RATIO = "optim/update_ratio/total"
_REWARD = "train/reward/total"

Array = npt.NDArray[np.float64]
_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Divergence(BuiltinRule):
    """Finds a loss that stays well above the best level it had, and gives back what it gained."""

    above: Annotated[float, Field(ge=1)] = 1.05
    """The loss, over `window` steps, is so many times its best."""
    given_back: Annotated[float, Field(ge=0)] = 0.5
    """Share of what the loss had fallen that it has risen again."""
    sigmas: Annotated[float, Field(ge=0)] = 4.0
    """The rise is so many times the scatter of single losses."""
    window: Steps = 12
    """Steps of which medians are taken."""
    reads = (LOSS, _REWARD)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (LOSS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 3 * self.window

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.window

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value, usual = history.last(LOSS), history.baseline(LOSS, 64)
        if not value > 1.02 * usual.median or len(history.samples(_REWARD)):
            return []
        losses = history.samples(LOSS)
        if len(losses) < 3 * self.window:
            return []
        recent, (levels, scatter) = median_of(losses[-self.window :]), _blocks(losses, self.window)
        best, first = float(levels.min()), float(levels[0])
        noise = self.sigmas * scatter
        limit = max(self.above * best, best + max(self.given_back * (first - best), noise))
        if not (recent > limit and best > 0):
            return []
        text = (
            f"the loss has risen to {recent:.4g}, the median of {self.window} steps, from "
            f"{best:.4g} at its best"
        )
        return [self.alert(history, LOSS, recent, limit, text)]


def _blocks(losses: Array, window: int) -> tuple[Array, float]:
    """Returns medians of blocks of the losses, and the typical scatter within a block."""
    blocks = losses[: len(losses) // window * window].reshape(-1, window)
    # From step to step, so that the fall of the loss is no scatter.
    scatter = 1.4826 * median_of(np.abs(np.diff(blocks, axis=1)).ravel()) / np.sqrt(2)
    return np.sort(blocks, axis=1)[:, window // 2], float(scatter)


@dataclass(frozen=True, kw_only=True)
class Rise(BuiltinRule):
    """Finds a loss that rises steadily, far more than its scatter allows."""

    sigmas: Annotated[float, Field(gt=0)] = 5.5
    """Slope of the line, in its standard errors."""
    least: Annotated[float, Field(ge=0)] = 0.02
    """The line rises by this share of the mean loss at least."""
    window: Annotated[int, Field(ge=8, le=240)] = 32
    """Number of losses."""
    reads = (LOSS, _REWARD)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (LOSS,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value, usual = history.last(LOSS), history.baseline(LOSS, self.window)
        if not value > usual.median or history[-1].step % 2 or len(history.samples(_REWARD)):
            return []
        losses = history.samples(LOSS)[-self.window :]
        if len(losses) < self.window:
            return []
        rise, error = _line(losses)
        limit = max(self.sigmas * error, self.least * abs(float(losses.mean())))
        if not rise > limit:
            return []
        text = (
            f"the loss has risen steadily over {self.window} steps, by {rise:.3g} in all, to "
            f"{value:.4g}"
        )
        return [self.alert(history, LOSS, value, value - rise + limit, text)]


def _line(values: Array) -> tuple[float, float]:
    """Returns how far the straight line through values rises over them, and its standard error."""
    places = np.arange(len(values)) - (len(values) - 1) / 2
    squares = float(places @ places)
    slope = float(places @ values) / squares
    rest = values - values.mean() - slope * places
    error = float(np.sqrt(rest @ rest / (len(values) - 2) / squares))
    return slope * len(values), error * len(values)


@dataclass(frozen=True, kw_only=True)
class Plateau(BuiltinRule):
    """Finds a loss that does not improve over many steps."""

    window: Annotated[int, Field(ge=20, le=240)] = 200
    """Steps without improvement."""
    improvement: Annotated[float, Field(ge=0, le=1)] = 0.002
    """Smallest relative improvement that counts."""
    reads = (LOSS,)

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
        if history[-1].step % 16 or len(history) < self.window:
            return []
        losses = history.samples(LOSS)[-self.window :]
        quarter = self.window // 4
        before, now = median_of(losses[:quarter]), median_of(losses[-quarter:])
        limit = before * (1 - self.improvement)
        if len(losses) < self.window or before <= 0 or now < limit:
            return []
        text = f"the loss has not improved for {self.window} steps ({before:.4g}, now {now:.4g})"
        return [self.alert(history, LOSS, now, limit, text)]


@dataclass(frozen=True, kw_only=True)
class NotLearning(BuiltinRule):
    """Finds a loss that is where it began while the weights hardly move."""

    steps: Annotated[int, Field(ge=20, le=240)] = 100
    """Steps that the run must have."""
    improvement: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Smallest relative improvement over the first 20 steps that counts."""
    ratio: _Factor = 1e-4
    """Update ratio below which the weights hardly move."""
    reads = (LOSS, RATIO)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (RATIO,)

    @property
    def steps_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if not history.last(RATIO) < self.ratio or len(history) < self.steps:
            return []
        losses = history.samples(LOSS)
        first, now = median_of(losses[:20]), median_of(losses[-20:])
        limit = first * (1 - self.improvement)
        if first <= 0 or now < limit or not history.highest(RATIO) < self.ratio:
            return []
        text = (
            f"the loss is {now:.4g} and began at {first:.4g}; a step changes the weights by "
            f"{history.last(RATIO):.2g} of their norm"
        )
        return [self.alert(history, LOSS, now, limit, text)]


@dataclass(frozen=True, kw_only=True)
class Collapse(BuiltinRule):
    """Finds a loss that falls to nothing within a few hundred steps."""

    below: _Factor = 0.02
    """Share of the start that is nothing."""
    reads = (LOSS, _REWARD)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (LOSS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 8

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value, start = history.last(LOSS), history.start(LOSS, 8)
        if not 0 < value < self.below * start or len(history.samples(_REWARD)):
            return []
        text = f"the loss is {value:.4g} and began at {start:.4g}, which is too good to be learnt"
        return [self.alert(history, LOSS, value, self.below * start, text)]

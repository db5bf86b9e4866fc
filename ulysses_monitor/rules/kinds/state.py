"""What a resume lost; Adam's moments that are not updated, or too small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.history import HISTORY, History

__all__ = ["LossAfterResume", "SmallMoment", "StaleState", "StateLost"]

NORM = "grad/norm/total"
WEIGHTS = "param/norm/total"
FIRST = "optim/exp_avg_norm/total"
LOSS = "train/loss/total"
BEFORE = "train/loss_before_resume/total"
REWARD = "train/reward/total"
SECOND = "optim/exp_avg_sq_mean/total"

_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class StaleState(BuiltinRule):
    """Finds an optimizer whose first moment is the same at two measured steps."""

    reads = (FIRST, NORM)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (FIRST,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 2

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return 2

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        moments = history.samples(FIRST)[-2:]
        if len(moments) < 2 or moments[0] != moments[1] or not history.last(NORM) > 0:
            return []
        if moments[0] == 0:
            return []
        text = f"Adam's first moment has not changed since it was last measured ({moments[0]:.4g})"
        return [self.alert(history, FIRST, float(moments[1]), float(moments[0]), text)]


@dataclass(frozen=True, kw_only=True)
class StateLost(BuiltinRule):
    """Finds an optimizer that begins without moments although the training goes on."""

    reads = (FIRST, WEIGHTS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (FIRST,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        first = history[0].step
        if first == 1 or len(history) == HISTORY:
            return []
        measured = np.flatnonzero(np.isfinite(history.column(WEIGHTS)))  # with the moments
        has_moments = np.isfinite(history.column(FIRST)[measured])
        if len(measured) != 2 or has_moments[0] or not has_moments[1]:
            return []
        text = f"the run goes on at step {first}, and the optimizer began without its moments there"
        return [self.alert(history, FIRST, history.last(FIRST), 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class LossAfterResume(BuiltinRule):
    """Finds losses after a resume that are all far above those before it."""

    times: Annotated[float, Field(gt=1)] = 1.3
    """How many times the largest loss that was logged last before."""
    steps: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of losses after the resume, all of which are so high."""
    reads = (BEFORE, LOSS, REWARD)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (BEFORE, LOSS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (LOSS,)

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        before = history.column(BEFORE)[-self.steps :]
        if len(before) < self.steps or not before[0] > 0 or len(history.samples(REWARD)):
            return []
        losses, limit = history.column(LOSS)[-self.steps :], self.times * float(before[0])
        if not (losses > limit).all():
            return []
        text = (
            f"the last {self.steps} losses, the first after a resume, are {losses.min():.4g} to "
            f"{losses.max():.4g}; before it they were {before[0]:.4g} at most"
        )
        return [self.alert(history, LOSS, float(losses.min()), limit, text)]


@dataclass(frozen=True, kw_only=True)
class SmallMoment(BuiltinRule):
    """Finds a second moment so small that Adam's epsilon decides the size of updates."""

    below: _Factor = 1e-17
    """Mean second moment; its root beside epsilon, 1e-8, is what an update is divided by."""
    reads = (SECOND, NORM)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (SECOND,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        moment = history.last(SECOND)
        if not 0 < moment < self.below or not history.last(NORM) > 0:
            return []
        text = f"Adam's second moment is {moment:.2g} on average, so epsilon sets the update's size"
        return [self.alert(history, SECOND, moment, self.below, text)]

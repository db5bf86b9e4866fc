"""What ranks have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.history import History, median_of

__all__ = ["SameLoss", "Straggler"]

SPREAD = "train/loss_rank_std/total"
EXCHANGED = "sp/all_to_all_bytes/total"
APART = "train/seconds_rank_std/total"
SECONDS = "train/step_seconds/total"


@dataclass(frozen=True, kw_only=True)
class SameLoss(BuiltinRule):
    """Finds ranks that all have the same loss."""

    reads = (SPREAD, EXCHANGED)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (SPREAD,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if history.last(SPREAD) != 0 or EXCHANGED in history[-1]:
            return []
        text = "all ranks have the same loss to the last bit, so they train on the same rows"
        return [self.alert(history, SPREAD, 0.0, 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class Straggler(BuiltinRule):
    """Finds ranks that reach their losses at very different times, so that some wait for others."""

    share: Annotated[float, Field(gt=0)] = 0.15
    """Standard deviation over ranks, as a share of a step; of two ranks, half the wait."""
    least_seconds: Annotated[float, Field(ge=0)] = 0.02
    """A smaller deviation is the scatter of small steps."""
    steps: Annotated[int, Field(ge=1, le=64)] = 8
    """Number of steps, over which medians are taken."""
    reads = (APART, SECONDS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (APART,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if not history.last(APART) > self.least_seconds or len(history) <= self.steps:
            return []
        apart = median_of(history.samples(APART)[-self.steps :])
        step = median_of(history.samples(SECONDS)[-self.steps :])
        limit = max(self.share * step, self.least_seconds)
        if not apart > limit:
            return []
        text = (
            f"the ranks' times from a step's start to its loss are {apart:.2g} s apart (standard "
            f"deviation), in steps of {step:.2g} s"
        )
        return [self.alert(history, APART, apart, limit, text)]

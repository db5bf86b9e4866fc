"""The training's loss beside an evaluation's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.history import History, median_of

__all__ = ["LossBesideEvaluation", "Overfitting"]

LOSS = "train/loss/total"
EVAL = "eval/loss/total"


@dataclass(frozen=True, kw_only=True)
class Overfitting(BuiltinRule):
    """Finds an evaluation's loss that rises, or does not move, while the training's falls."""

    rise: Annotated[float, Field(ge=1)] = 1.05
    """The evaluation's loss is so many times its best; 1 finds one that does not improve."""
    evaluations: Annotated[int, Field(ge=2, le=100)] = 3
    """Evaluations that there must be."""
    gain: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share by which the training's loss fell meanwhile."""
    reads = (EVAL, LOSS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (EVAL,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.evaluations

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        column = history.column(EVAL)
        places = np.flatnonzero(np.isfinite(column))
        if len(places) < self.evaluations:
            return []
        found, losses = column[places], history.column(LOSS)
        best = int(found[:-1].argmin())
        limit = self.rise * float(found[best])
        # The training's loss around the best evaluation, and now.
        then = _middle(losses[max(0, places[best] - 16) : places[best] + 1])
        now = _middle(losses[-16:])
        if not (found[-1] > limit and now < (1 - self.gain) * then):
            return []
        text = (
            f"the evaluation's loss is {found[-1]:.4g} and was {found[best]:.4g} at step "
            f"{history[int(places[best])].step}; the training's fell from {then:.4g} to {now:.4g}"
        )
        return [self.alert(history, EVAL, float(found[-1]), limit, text)]


@dataclass(frozen=True, kw_only=True)
class LossBesideEvaluation(BuiltinRule):
    """Finds a training loss that is a multiple of the evaluation's, which is a mean."""

    above: Annotated[float, Field(gt=1)] = 1.8
    """How many times the evaluation's loss the training's is; 2 is the least that sums make."""
    steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Newest losses whose median is compared: few, because the loss falls fast at first."""
    reads = (EVAL, LOSS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (EVAL,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        evaluated, losses = history.last(EVAL), history.samples(LOSS)[-self.steps :]
        limit = self.above * evaluated
        if len(losses) < self.steps or not median_of(losses) > limit > 0:
            return []
        now = median_of(losses)
        text = (
            f"the training's loss is {now:.4g}, {now / evaluated:.3g} times the evaluation's "
            f"{evaluated:.4g}"
        )
        return [self.alert(history, LOSS, now, limit, text)]


def _middle(values: npt.NDArray[np.float64]) -> float:
    return median_of(values[np.isfinite(values)])

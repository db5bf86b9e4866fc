"""Settings of the optimizer that cannot be meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.history import History

__all__ = ["BetasSwapped", "LargeEpsilon", "StrongDecay"]

BETA1, BETA2 = "optim/beta1/*", "optim/beta2/*"
EPSILON = "optim/eps/*"
DECAY, RATES = "optim/weight_decay/*", "optim/lr/*"

_Positive = Annotated[float, Field(gt=0)]


def _name(pattern: str, group: int) -> str:
    return pattern.replace("*", str(group))


@dataclass(frozen=True, kw_only=True)
class BetasSwapped(BuiltinRule):
    """Finds a first moment that remembers for longer than the second."""

    tables = (BETA1, BETA2)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        _, firsts = history.table(BETA1)
        _, seconds = history.table(BETA2)
        if not firsts or not seconds or len(firsts[-1]) != len(seconds[-1]):
            return []
        odd = np.flatnonzero(firsts[-1] > seconds[-1])
        if not len(odd):
            return []
        first, second = float(firsts[-1][odd[0]]), float(seconds[-1][odd[0]])
        text = f"Adam's betas are ({first:g}, {second:g}); the first is meant to be the smaller one"
        return [self.alert(history, _name(BETA1, int(odd[0])), first, second, text)]


@dataclass(frozen=True, kw_only=True)
class LargeEpsilon(BuiltinRule):
    """Finds an epsilon of Adam that decides the size of updates."""

    above: _Positive = 2e-3
    """Largest epsilon that is used."""
    tables = (EPSILON, BETA2)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        _, rows = history.table(EPSILON)
        _, has_betas = history.table(BETA2)
        if not rows or not has_betas:  # another optimizer's epsilon
            return []
        value = float(rows[-1].max())
        if not value > self.above:
            return []
        text = f"Adam's epsilon is {value:g}, usually 1e-8"
        metric = _name(EPSILON, int(rows[-1].argmax()))
        return [self.alert(history, metric, value, self.above, text)]


@dataclass(frozen=True, kw_only=True)
class StrongDecay(BuiltinRule):
    """Finds a weight decay that forgets the weights within some hundred steps."""

    above: _Positive = 2e-3
    """Rate times weight decay: the part of the weights that each step takes away."""
    tables = (DECAY, RATES)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (DECAY,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        _, decays = history.table(DECAY)
        _, rates = history.table(RATES)
        if not decays or not rates or len(decays[-1]) != len(rates[-1]):
            return []
        taken = decays[-1] * rates[-1]
        worst = int(taken.argmax())
        if not taken[worst] > self.above:
            return []
        text = (
            f"weight_decay {decays[-1][worst]:g} at a learning rate of {rates[-1][worst]:.2g} "
            f"takes {taken[worst]:.2%} of the weights at each step"
        )
        return [self.alert(history, _name(DECAY, worst), float(taken[worst]), self.above, text)]

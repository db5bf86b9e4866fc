"""Layers compared with one another, and with what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps, name_some
from ulysses_monitor.rules.history import History

__all__ = ["LayerRange", "LayerShift"]

NORMS = "grad/norm/layer/*"
_PREFIX = "grad/norm/"

_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class LayerRange(BuiltinRule):
    """Finds layers whose gradient is far below, or far above, that of the median layer."""

    below: _Factor | None = None
    """Share of the median layer's norm below which a layer gets too little; zero is not meant."""
    above: _Factor | None = None
    """Multiple of the median layer's norm above which a layer gets too much."""
    tables = (NORMS,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, rows = history.table(NORMS)
        values = rows[-1].tolist()
        median = sorted(values)[len(values) // 2]
        if len(values) < 3 or not median > 0:
            return []
        if self.below is not None:
            limit = self.below * median
            odd = [i for i, value in enumerate(values) if 0 < value < limit]
        else:
            limit = (self.above or 1.0) * median
            odd = [i for i, value in enumerate(values) if value > limit]
        if not odd:
            return []
        where = name_some(names[i].removeprefix(_PREFIX) for i in odd)
        value = values[odd[0]]
        text = (
            f"the gradient of {where} is {value:.3g}, {value / median:.2g} times that of the "
            "median layer"
        )
        return [self.alert(history, f"{NORMS}", value, limit, text, where=where)]


@dataclass(frozen=True, kw_only=True)
class LayerShift(BuiltinRule):
    """Finds a layer whose gradient left its usual size, or vanished, while others kept theirs."""

    times: _Factor = 5.0
    """How many times more than the median layer it rose or fell."""
    window: Steps = 32
    """Number of steps that say what is usual."""
    tables = (NORMS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.window + 1

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, rows = history.table(NORMS)
        usual, row = history.usual_row(NORMS, self.window), rows[-1]
        if len(usual) != len(row) or len(row) < 3:
            return []
        if usual.min() == 0:  # a layer that had none before either
            return []
        found = (row / usual).tolist()
        middle = sorted(found)[len(found) // 2]
        if not middle > 0:
            return []
        highest, lowest = max(found), min(found)
        odd = highest if highest / middle > self.times else lowest
        if not (highest / middle > self.times or lowest < middle / self.times):
            return []
        where = names[found.index(odd)].removeprefix(_PREFIX)
        text = (
            f"the gradient of {where} is {odd:.3g} times its usual size, and that of the median "
            f"layer {middle:.3g} times"
        )
        limit = middle * (self.times if odd == highest else 1 / self.times)
        return [self.alert(history, f"{_PREFIX}{where}", odd, limit, text, where=where)]

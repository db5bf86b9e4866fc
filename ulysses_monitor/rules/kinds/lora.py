"""The two sides of LoRA adapters, and what they add to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ulysses_monitor.common.settings import MetricName, Text
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, name_some
from ulysses_monitor.rules.history import History

__all__ = ["AdapterWithoutGradient", "IdleAdapter", "LoraImbalance", "RankCollapse"]

DELTA = "lora/delta_ratio/total"
RANK = "lora/stable_rank/total"
NORMS = "grad/norm/param/*lora_*"

_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class LoraImbalance(BuiltinRule):
    """Finds adapters of which one side gets almost all of the gradient, for `patience` steps.

    The ratio is infinite at the first step, where B = 0 keeps A's gradient at zero, and falls over
    about a hundred steps on a healthy run; so the rule waits for `warmup` steps.
    """

    name: Text = "lora_imbalance"
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    patience: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    metric: MetricName = "lora/grad_ratio_B_A/total"
    """The ratio of B's gradient norm to A's."""
    low: _Factor = 0.02
    """A ratio below this is out of balance."""
    high: _Factor = 50.0
    """A ratio above this is out of balance."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        ratio = history.last(self.metric)
        if not (ratio < self.low or ratio > self.high):
            return []
        side = "A" if ratio > self.high else "B"
        limit = self.high if ratio > self.high else self.low
        text = (
            f"LoRA's {side} has had almost no gradient for {self.patience} steps "
            f"(B/A is {ratio:.3g})"
        )
        return [self.alert(history, self.metric, ratio, limit, text, where=f"lora_{side}")]


@dataclass(frozen=True, kw_only=True)
class RankCollapse(BuiltinRule):
    """Finds adapters whose product is of rank one, after it had more."""

    below: _Factor = 1.02
    """Stable rank that counts as one."""
    had: _Factor = 1.5
    """Stable rank that it had before."""
    reads = (RANK,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        rank = history.last(RANK)
        if not rank < self.below:
            return []
        highest = history.highest(RANK)
        if not highest >= self.had:
            return []
        text = f"the adapters' stable rank has fallen from {highest:.2f} to {rank:.2f}"
        return [self.alert(history, RANK, rank, self.below, text)]


@dataclass(frozen=True, kw_only=True)
class IdleAdapter(BuiltinRule):
    """Finds adapters that still add nothing to the weights."""

    steps: Annotated[int, Field(ge=2)] = 11
    """Steps after which an adapter must have moved."""
    reads = (DELTA,)

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
        if history.last(DELTA) != 0 or len(history) < self.steps:
            return []
        text = "the adapters still add nothing to the weights: BA is zero"
        return [self.alert(history, DELTA, 0.0, 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class AdapterWithoutGradient(BuiltinRule):
    """Finds adapters of which neither side gets a gradient while others do.

    Only one side of an adapter is zero at first, so the other has a gradient from the first step.
    """

    tables = (NORMS,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, rows = history.table(NORMS)
        norms = dict(zip(names, rows[-1].tolist(), strict=True))
        if all(norms.values()) or not any(norms.values()):
            return []
        idle = [
            name
            for name, norm in norms.items()
            # Experts that no row uses get none, which is harmless.
            if norm == 0 and norms.get(_other_side(name)) == 0 and "expert" not in name
        ]
        if not idle:
            return []
        where = name_some(name.removeprefix("grad/norm/param/") for name in idle)
        text = f"{len(idle) // 2} adapters get no gradient on either side: {where}"
        return [self.alert(history, NORMS, 0.0, 0.0, text, where=where)]


def _other_side(name: str) -> str:
    """Returns the name of an adapter's other side."""
    sides = ("_A", "_B") if "_A" in name else ("_B", "_A")
    return name.replace(f"lora{sides[0]}", f"lora{sides[1]}").replace(
        f"lora_embedding{sides[0]}", f"lora_embedding{sides[1]}"
    )

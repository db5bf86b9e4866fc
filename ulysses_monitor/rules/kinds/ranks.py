"""What ranks have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.history import History

__all__ = ["SameLoss"]

SPREAD = "train/loss_rank_std/total"
EXCHANGED = "sp/all_to_all_bytes/total"


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

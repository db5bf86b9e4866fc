"""What became of a decision, as an event."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ulysses_monitor.policies import Decision
from ulysses_monitor.records import Event
from ulysses_monitor.steering.acting import Done

__all__ = ["Told"]

_NAMED = 10
"""Parameters that an event names; of more it gives the number."""


@dataclass(frozen=True)
class Told:
    """What became of a decision.

    Attributes:
        decision: the policy and its action.
        norm_before: of all gradients, as the engine made them.
        norm: after all of the step's actions: the engine clips by it.
        done: what was done; None in shadow mode.
    """

    decision: Decision
    norm_before: float | None = None
    norm: float | None = None
    done: Done | None = field(default=None)

    def to_event(self, step: int) -> Event:
        """As an event of kind ``action``."""
        action = self.decision.action
        values = dict(list(action.values.items())[:_NAMED])
        data: dict[str, Any] = {
            "policy": self.decision.policy,
            "action": action.kind,
            "mode": "shadow" if self.done is None else "active",
            "values": values,
            "targets": list(action.targets)[:_NAMED],
            "reason": action.reason,
            "read": dict(action.read),
        }
        if self.done is not None:
            data |= {"norm_before": self.norm_before, "norm_after": self.norm}
            if self.done.note:
                data["note"] = self.done.note
            if self.done.tensors is not None:
                data["tensors"] = self.done.tensors[:_NAMED]
                data["tensor_count"] = len(self.done.tensors)
        return Event(kind="action", step=step, time=time.time(), data=data)

"""A decision of a policy and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ulysses_monitor.records import KINDS, Action, Event

__all__ = ["Outcome", "OutcomeMode"]

OutcomeMode = Literal["shadow", "active"]

_MAX_NAMES = 10
"""Parameters that an event names; beyond them it gives the count."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An action that a policy asked for at a step, and what became of it.

    A policy's answer becomes an outcome, steering adds what was done, and the event that the run
    records is made from it. In shadow mode, and in a replay, nothing is added.

    Attributes:
        policy: name of the policy.
        action: what it asked for.
        mode: ``shadow`` where the action is recorded and not performed.
        tensors: names of the parameters whose gradients were edited or that were frozen; None for
            an action on something else.
        note: what else people should know, such as why the action was not performed.
        norm_before: norm of all gradients as the engine computed them.
        norm_after: norm of all gradients after all actions of the step, which the engine clips by.
    """

    policy: str
    action: Action
    mode: OutcomeMode = "active"
    tensors: Sequence[str] | None = None
    note: str = ""
    norm_before: float | None = None
    norm_after: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether the action is performed rather than only recorded."""
        return self.mode == "active"

    @property
    def target(self) -> str:
        """What the action changes: ``gradients``, ``rate``, ``update`` or ``training``."""
        return KINDS[self.action.kind].on

    def with_note(self, note: str) -> Outcome:
        """Returns the same outcome with another note."""
        return replace(self, note=note)

    def to_event(self, step: int, time: float) -> Event:
        """Returns an event of kind ``action``.

        Args:
            step: the optimizer step.
            time: seconds since the epoch.
        """
        data: dict[str, Any] = {
            "policy": self.policy,
            "action": self.action.kind,
            "mode": self.mode,
            "values": dict(list(self.action.values.items())[:_MAX_NAMES]),
            "targets": list(self.action.targets)[:_MAX_NAMES],
            "reason": self.action.reason,
            "read": dict(self.action.read),
        }
        if self.is_active:
            data |= {"norm_before": self.norm_before, "norm_after": self.norm_after}
            if self.note:
                data["note"] = self.note
            if self.tensors is not None:
                data["tensors"] = list(self.tensors)[:_MAX_NAMES]
                data["tensor_count"] = len(self.tensors)
        return Event(kind="action", step=step, time=time, data=data)

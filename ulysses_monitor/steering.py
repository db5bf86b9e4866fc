"""Lets policies act on a step, or only say what they would have done."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulysses_monitor.actions import GradientEditor, RateFactors
from ulysses_monitor.engines import Engine
from ulysses_monitor.policies import Decision, Policy, PolicySet
from ulysses_monitor.records import Action, Event, StepRecord

__all__ = ["Steering", "Told"]

logger = logging.getLogger(__name__)

_NAMED = 20
"""Parameters that an event names; of more it gives the number."""


@dataclass(frozen=True)
class Told:
    """What became of a decision.

    Attributes:
        decision: the policy and its action.
        shadow: whether it was only said.
        norm_before: of all gradients, as the engine made them.
        norm: after all of the step's actions: the engine clips by it. None where nothing was done.
        tensors: the parameters whose gradients were edited.
    """

    decision: Decision
    shadow: bool = False
    norm_before: float | None = None
    norm: float | None = None
    tensors: list[str] | None = None

    def to_event(self, step: int, time: float) -> Event:
        """As an event of kind ``action``."""
        action = self.decision.action
        data: dict[str, Any] = {
            "policy": self.decision.policy,
            "action": action.kind,
            "mode": "shadow" if self.shadow else "active",
            "values": dict(action.values),
            "targets": list(action.targets),
            "reason": action.reason,
            "read": dict(action.read),
        }
        if not self.shadow:
            data |= {"norm_before": self.norm_before, "norm_after": self.norm}
        if self.tensors is not None:
            data |= {"tensors": self.tensors[:_NAMED], "tensor_count": len(self.tensors)}
        return Event(kind="action", step=step, time=time, data=data)


class Steering:
    """Asks policies at each step, on every rank alike, and does what they say.

    Args:
        engine: what is trained.
        policies: asked in this order, which is also that of their actions.
        shadow: decide and tell, touch nothing.
        seed: of noise.
    """

    def __init__(
        self, engine: Engine, policies: Sequence[Policy], *, shadow: bool, seed: int
    ) -> None:
        self._policies = PolicySet(policies)
        self._shadow = shadow
        self._editor = GradientEditor(engine, seed)
        self._rates = RateFactors(engine.optimizer)
        self._off = False

    def __bool__(self) -> bool:
        return bool(self._policies) and not self._off

    def steer(self, record: StepRecord) -> list[Told]:
        """Decides on a step whose gradients are not clipped yet, and acts.

        Args:
            record: what is known of the step, alike on all ranks.

        Returns:
            What was done, or would have been, an entry for each action.
        """
        # As the run store keeps them, so that a replay decides as it was decided here.
        kept = record.values.astype(np.float32).astype(np.float64)
        decisions = self._policies.decide(StepRecord(record.step, record.time, record.schema, kept))
        if not decisions or self._shadow:
            return [Told(decision, shadow=True) for decision in decisions]
        try:
            return self._act(decisions, record)
        except Exception:
            self._off = True
            logger.exception("monitor: could not act at step %d; policies are off", record.step)
            return []

    def _act(self, decisions: Sequence[Decision], record: StepRecord) -> list[Told]:
        self._rates.apply(_factors([d.action for d in decisions]))
        edits = [d for d in decisions if d.action.kind != "lr_factor"]
        before = record.get("grad/norm/total")
        if not edits:
            return [Told(d, norm_before=before, norm=before) for d in decisions]
        effect = self._editor.apply([d.action for d in edits], record.step)
        tensors = {id(d): names for d, names in zip(edits, effect.tensors, strict=True)}
        return [
            Told(d, norm_before=before, norm=effect.norm, tensors=tensors.get(id(d)))
            for d in decisions
        ]

    def stepped(self) -> None:
        """Gives the learning rates back to the scheduler, after the optimizer's step."""
        self._rates.restore()


def _factors(actions: Sequence[Action]) -> dict[int | None, float]:
    """Factors on learning rates by group; the first policy that names a group has it."""
    factors: dict[int | None, float] = {}
    for action in actions:
        if action.kind == "lr_factor":
            group = action.values.get("group")
            factors.setdefault(None if group is None else int(group), action.values["factor"])
    return factors

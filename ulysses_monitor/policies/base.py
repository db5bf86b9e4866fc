"""What a policy is, and how a set of policies turns record history into actions."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ulysses_monitor.errors import InputError
from ulysses_monitor.records import Action, StepRecord

__all__ = ["HISTORY", "Decide", "Decision", "Policy", "PolicySet", "checked_policies"]

logger = logging.getLogger(__name__)

HISTORY = 256
"""Records that a policy can look back on."""

_MAX_FAILURES = 3


Decide = Callable[[Sequence[StepRecord]], Iterable[Action]]
"""A policy as a function of the history."""


@runtime_checkable
class Policy(Protocol):
    """A pure function of record history: the same code serves training and shadow mode.

    Every rank asks it, with the same records, and must get the same answer: no clock, no random
    number, no state of its own.
    """

    @property
    def name(self) -> str:
        """What events carry as `policy`."""
        ...

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """Actions for the newest record, ``history[-1]``, before its gradients are clipped.

        Args:
            history: up to `HISTORY` records, oldest first, never empty. They hold what is known
                before a step is done: gradients, LoRA ratios, loss, learning rates, and, in
                sampled steps, parameters and optimizer state.
        """
        ...


@dataclass(frozen=True)
class _Function:
    """A function of the history as a policy."""

    name: str
    decide: Decide


@dataclass(frozen=True)
class Decision:
    """An action, and which policy asked for it."""

    policy: str
    action: Action


def checked_policies(policies: Any) -> list[Policy]:
    """`policies` as a list, each under a name of its own.

    Args:
        policies: policies, or functions of the history.

    Raises:
        InputError: one of them is neither.
    """
    if isinstance(policies, str) or not isinstance(policies, Iterable):
        raise InputError(
            f"monitor: policies is {policies!r}; allowed is a list of policies or of functions "
            "of the history"
        )
    checked: list[Policy] = []
    names: Counter[str] = Counter()
    for policy in policies:
        name, decide = _parts(policy)
        names[name] += 1
        own = name if names[name] == 1 else f"{name}-{names[name]}"
        checked.append(_Function(own, decide))
    return checked


def _parts(policy: Any) -> tuple[str, Decide]:
    if isinstance(policy, type):
        raise InputError(f"monitor: policy {policy.__name__} is a class; allowed is an object")
    if isinstance(policy, Policy):
        return str(policy.name), policy.decide
    if callable(policy):
        return str(getattr(policy, "__name__", type(policy).__name__)), policy
    raise InputError(
        f"monitor: policy {type(policy).__name__} is no function, and has no name and "
        "decide(history)"
    )


class PolicySet:
    """Asks policies over a growing history.

    Where gradients or the loss are not finite, all of them stand back: their numbers say nothing.
    A policy that raises is logged, and off after some times; it costs nobody else anything.

    Args:
        policies: the policies.
    """

    def __init__(self, policies: Iterable[Policy]) -> None:
        self._policies = list(policies)
        self._history: deque[StepRecord] = deque(maxlen=HISTORY)
        self._failures: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._policies)

    def decide(self, record: StepRecord) -> list[Decision]:
        """Adds `record`; what the policies ask for at it, in their order."""
        self._history.append(record)
        if not _is_sound(record):
            return []
        history = list(self._history)
        return [d for policy in self._policies for d in self._ask(policy, history)]

    def _ask(self, policy: Policy, history: list[StepRecord]) -> list[Decision]:
        if self._failures[policy.name] >= _MAX_FAILURES:
            return []
        try:
            actions = list(policy.decide(history) or ())
            wrong = next((a for a in actions if not isinstance(a, Action)), None)
            if wrong is not None:
                raise TypeError(f"got a {type(wrong).__name__}; allowed is um.Action")
        except Exception:
            self._failures[policy.name] += 1
            logger.exception("monitor: policy %r failed", policy.name)
            return []
        return [Decision(policy.name, action) for action in actions]


def _is_sound(record: StepRecord) -> bool:
    loss = record.get("train/loss/total", 0.0)
    return math.isfinite(loss) and not record.get("grad/nonfinite/total", 0.0) > 0

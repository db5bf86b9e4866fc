"""Asks a set of policies over a growing history."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.policies.managed import Managed
from ulysses_monitor.records import Action, Mode, StepRecord, schema_of

__all__ = ["Decision", "PolicySet", "is_sound", "plain_numbers"]

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3


@dataclass(frozen=True)
class Decision:
    """An action, which policy asked for it, and whether it is only to be told."""

    policy: str
    action: Action
    shadow: bool = False


class PolicySet:
    """Policies, their modes and their common history.

    Where gradients or the loss are not finite, all of them stand back: their numbers say nothing.
    A policy that raises is logged, and off after some times; it costs nobody else anything.

    Args:
        policies: asked in this order.
        mode: of those that have none of their own.
    """

    def __init__(self, policies: Sequence[Managed], mode: Mode) -> None:
        self._policies = list(policies)
        self._history: deque[StepRecord] = deque(
            maxlen=max((p.lookback for p in self._policies), default=1)
        )
        self._failures: Counter[str] = Counter()
        self._left_out: list[str] = []
        self.modes: dict[str, Mode] = {p.name: p.mode or mode for p in self._policies}
        for policy in self._policies:
            policy.reset()

    def __bool__(self) -> bool:
        return any(mode != "off" for mode in self.modes.values())

    @property
    def acts(self) -> bool:
        """Whether any policy is active."""
        return "active" in self.modes.values()

    def set_mode(self, name: str, mode: Mode) -> None:
        """Switches a policy, or all with ``*``.

        Raises:
            InputError: there is no such policy.
        """
        if name != "*" and name not in self.modes:
            allowed = ", ".join(self.modes) or "none: the run has no policies"
            raise InputError(
                f"policy {name!r}: not in this run{nearest(name, self.modes)}; it has {allowed}"
            )
        for each in self.modes if name == "*" else (name,):
            self.modes[each] = mode

    def leave_out(self, name: str) -> None:
        """Takes a policy out of the run."""
        self._policies = [policy for policy in self._policies if policy.name != name]
        self._left_out.append(name)
        del self.modes[name]

    def decide(self, record: StepRecord) -> list[Decision]:
        """Adds `record`; what the policies ask for at it, in their order."""
        if not is_sound(record):
            return []
        self._history.append(record)
        history = list(self._history)
        return [d for policy in self._policies for d in self._ask(policy, history)]

    def _ask(self, policy: Managed, history: list[StepRecord]) -> list[Decision]:
        mode = self.modes[policy.name]
        if mode == "off" or self._failures[policy.name] >= _MAX_FAILURES:
            return []
        try:
            actions = list(policy.decide(history) or ())
            for action in actions:
                if not isinstance(action, Action):
                    raise TypeError(f"got a {type(action).__name__}; allowed is um.Action")
        except Exception:
            self._failures[policy.name] += 1
            logger.exception("monitor: policy %r failed", policy.name)
            return []
        return [Decision(policy.name, action, mode == "shadow") for action in actions]

    # -- what travels with a checkpoint --------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Modes, failures and the policies' own states, JSON-ready as far as theirs are."""
        states = {p.name: self._state_of(p) for p in self._policies}
        return {
            "modes": dict(self.modes),
            "left_out": list(self._left_out),
            "failures": dict(self._failures),
            "states": {name: state for name, state in states.items() if state is not None},
        }

    def _state_of(self, policy: Managed) -> dict[str, Any] | None:
        try:
            state = policy.state_dict()
            json.dumps(state, default=plain_numbers)
            return state
        except Exception:  # a checkpoint is worth more than one policy's memory
            self._failures[policy.name] += 1
            logger.exception("monitor: policy %r gives no state; it will begin anew", policy.name)
            return None

    def history_arrays(self) -> list[tuple[tuple[str, ...], npt.NDArray[np.float64]]]:
        """The history, as runs of records with the same names: step, time and values [N, 2 + M]."""
        found: list[tuple[tuple[str, ...], list[npt.NDArray[np.float64]]]] = []
        for record in self._history:
            row = np.concatenate([[record.step, record.time], record.values])
            if not found or found[-1][0] != record.schema.names:
                found.append((record.schema.names, []))
            found[-1][1].append(row)
        return [(names, np.stack(rows)) for names, rows in found]

    def load(
        self,
        state: Mapping[str, Any],
        history: Sequence[tuple[tuple[str, ...], npt.NDArray[np.float64]]],
    ) -> list[str]:
        """Takes `state_dict` and `history_arrays` back, each policy under its name.

        Returns:
            Names of policies that it says nothing of, which begin anew.
        """
        known = [p for p in self._policies if p.name in state["modes"]]
        for policy in known:
            self.modes[policy.name] = state["modes"][policy.name]
            self._failures[policy.name] = int(state["failures"].get(policy.name, 0))
            if policy.name in state["states"] and policy.state_dict() is not None:
                policy.load_state_dict(state["states"][policy.name])
        self._history.clear()
        for names, rows in history:
            schema = schema_of(tuple(names))
            self._history.extend(StepRecord(int(r[0]), float(r[1]), schema, r[2:]) for r in rows)
        known_of = {*state["modes"], *state["left_out"]}
        return [p.name for p in self._policies if p.name not in known_of]


def plain_numbers(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, for JSON.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a policy's state holds a {type(value).__name__}; allowed is what JSON has")


def is_sound(record: StepRecord) -> bool:
    """Whether loss and gradients are finite."""
    loss = record.get("train/loss/total", 0.0)
    return math.isfinite(loss) and not record.get("grad/nonfinite/total", 0.0) > 0

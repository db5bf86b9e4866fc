"""Asks a set of policies over a growing history."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.policies.managed import Managed
from ulysses_monitor.policies.nonfinite import is_finite, skip_nonfinite
from ulysses_monitor.policies.outcome import Outcome, OutcomeMode
from ulysses_monitor.records import Action, Mode, StepRecord, schema_of

__all__ = ["PolicySet", "numpy_to_python"]


class PolicySet:
    """Policies, their modes and their common history.

    If the gradients or the loss of a step are not finite, no policy is asked: their numbers mean
    nothing, and the step is skipped. A policy that raises is switched off after a few failures.

    Args:
        policies: asked in this order.
        mode: of policies that have no mode of their own.
        guard: calls the policies.
    """

    def __init__(self, policies: Sequence[Managed], mode: Mode, guard: Guard | None = None) -> None:
        self._policies = list(policies)
        self._history: deque[StepRecord] = deque(
            maxlen=max((p.lookback for p in self._policies), default=1)
        )
        self._guard = guard or Guard()
        self._left_out: list[str] = []
        self.modes: dict[str, Mode] = {p.name: p.mode or mode for p in self._policies}
        for policy in self._policies:
            policy.reset()

    @property
    def enabled(self) -> list[Managed]:
        """Policies whose mode is not off."""
        return [p for p in self._policies if self.modes[p.name] != "off"]

    @property
    def has_active(self) -> bool:
        """Whether any policy is active."""
        return "active" in self.modes.values()

    def set_mode(self, name: str, mode: Mode) -> None:
        """Sets the mode of a policy, or of all with ``*``.

        Raises:
            InputError: the run has no such policy.
        """
        if name != "*" and name not in self.modes:
            allowed = ", ".join(self.modes) or "none: the run has no policies"
            raise InputError(
                f"policy {name!r} is not in this run{nearest(name, self.modes)}; allowed: {allowed}"
            )
        for each in self.modes if name == "*" else (name,):
            self.modes[each] = mode

    def leave_out(self, names: Iterable[str]) -> None:
        """Removes policies from the run."""
        for name in names:
            self._policies = [policy for policy in self._policies if policy.name != name]
            self._left_out.append(name)
            del self.modes[name]

    def decide(self, record: StepRecord) -> list[Outcome]:
        """Adds `record` to the history and returns what the policies ask for, in their order.

        Args:
            record: what is known of the step before it is done, from `policy_view`.
        """
        if not self.enabled:
            return []
        if not is_finite(record):
            mode: OutcomeMode = "active" if self.has_active else "shadow"
            return [Outcome(policy="nonfinite", action=skip_nonfinite(record), mode=mode)]
        self._history.append(record)
        history = list(self._history)
        return [outcome for policy in self.enabled for outcome in self._ask(policy, history)]

    def _ask(self, policy: Managed, history: list[StepRecord]) -> list[Outcome]:
        actions: Sequence[Action] = self._guard.call(
            _part(policy), lambda: _checked(policy.decide(history)), []
        )
        mode: OutcomeMode = "active" if self.modes[policy.name] == "active" else "shadow"
        return [Outcome(policy=policy.name, action=action, mode=mode) for action in actions]

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns modes, failures and the policies' own states, ready for JSON if theirs are."""
        states = {p.name: self._state_of(p) for p in self._policies}
        return {
            "modes": dict(self.modes),
            "left_out": list(self._left_out),
            "failures": {p.name: self._guard.failures[_part(p)] for p in self._policies},
            "states": {name: state for name, state in states.items() if state is not None},
        }

    def _state_of(self, policy: Managed) -> dict[str, Any] | None:
        """Returns a policy's state; a checkpoint is worth more than one policy's memory."""

        def state() -> dict[str, Any] | None:
            found = policy.state_dict()
            json.dumps(found, default=numpy_to_python)
            return found

        return self._guard.call(_part(policy), state, None)

    def history_arrays(self) -> list[tuple[tuple[str, ...], npt.NDArray[np.float64]]]:
        """Returns the history in chunks of equal names: step, time and values [N, 2 + M]."""
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
        """Restores what `state_dict` and `history_arrays` returned, each policy by its name.

        Returns:
            Names of policies that the state does not contain; they start without a memory.
        """
        known = [p for p in self._policies if p.name in state["modes"]]
        for policy in known:
            self.modes[policy.name] = state["modes"][policy.name]
            self._guard.failures[_part(policy)] = int(state["failures"].get(policy.name, 0))
            if policy.name in state["states"] and policy.state_dict() is not None:
                policy.load_state_dict(state["states"][policy.name])
        self._history.clear()
        for names, rows in history:
            schema = schema_of(tuple(names))
            self._history.extend(StepRecord(int(r[0]), float(r[1]), schema, r[2:]) for r in rows)
        contained = {*state["modes"], *state["left_out"]}
        return [p.name for p in self._policies if p.name not in contained]


def _part(policy: Managed) -> str:
    return f"policy {policy.name}"


def _checked(actions: Iterable[Action] | None) -> list[Action]:
    found = list(actions or ())
    for action in found:
        if not isinstance(action, Action):
            raise TypeError(f"decide() returned a {type(action).__name__}; expected um.Action")
    return found


def numpy_to_python(value: Any) -> Any:
    """Converts NumPy's numbers and arrays for `json.dumps`.

    Raises:
        TypeError: `value` is something else.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a policy's state holds a {type(value).__name__}; expected what JSON has")

"""A policy as a run has it: under a name of its own, in a mode, with values for the late phase."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.base import HISTORY, MAX_STEPS, BuiltinPolicy, Policy, share_to_steps
from ulysses_monitor.records import Action, Mode, StepRecord

__all__ = ["LATE_START", "Managed"]

LATE_START = 0.9
"""Share of all steps after which training is late."""


@dataclass(kw_only=True)
class Managed:
    """A policy and what the run decides about it.

    Attributes:
        name: no other policy of the run has it.
        policy: decides.
        mode: off, shadow or active; None for the run's.
        late: decides in its place in the late phase, with the same memory; ``off`` for nobody,
            None where there is no late phase.
        late_start: share of all steps after which it is late.
        preset: the preset that brought it, empty where the user named it.
    """

    name: str
    policy: Policy
    mode: Mode | None = None
    late: BuiltinPolicy | Literal["off"] | None = None
    late_start: float = LATE_START
    preset: str = ""
    _fresh: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._fresh = self.state_dict()

    @property
    def lookback(self) -> int:
        """Records of the history that it may look at."""
        return self.policy.lookback if isinstance(self.policy, BuiltinPolicy) else HISTORY

    @property
    def action_kinds(self) -> frozenset[str]:
        """Kinds of action that it is known to ask for."""
        return self.policy.action_kinds if isinstance(self.policy, BuiltinPolicy) else frozenset()

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """Patterns of metrics that it is known to need.

        A preset may be used where nobody knows the number of steps: it has no late phase there.
        """
        own = self.policy.needed_metrics if isinstance(self.policy, BuiltinPolicy) else ()
        return own if self.late is None or self.preset else (*own, MAX_STEPS)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`; in the late phase it is the late one that decides."""
        record = history[-1]
        begin = share_to_steps(self.late_start, record.get(MAX_STEPS))
        if self.late is None or not record.step > begin:  # NaN where nobody knows the end
            return self.policy.decide(history)
        if self.late == "off":
            return ()
        assert isinstance(self.policy, BuiltinPolicy)  # noqa: S101 - the late one is made of it
        self.late.memory = self.policy.memory
        actions = list(self.late.decide(history))
        self.policy.memory = self.late.memory
        return actions

    def reset(self) -> None:
        """Forgets what an earlier training left; a policy may serve several, one by one."""
        if self._fresh is not None:
            self.load_state_dict(self._fresh)

    def state_dict(self) -> dict[str, Any] | None:
        """A copy of what the policy remembers; None where it remembers nothing."""
        give, take = (getattr(self.policy, n, None) for n in ("state_dict", "load_state_dict"))
        if not callable(give) or not callable(take):
            return None
        state = give()
        if not isinstance(state, Mapping):
            raise InputError(
                f"policy {self.name}: state_dict() gives {state!r:.100}; allowed is a mapping"
            )
        return copy.deepcopy(dict(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives it back."""
        self.policy.load_state_dict(copy.deepcopy(dict(state)))  # type: ignore[attr-defined]

"""What a policy is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.settings import Texts, check_fields
from ulysses_monitor.records import Action, StepRecord

__all__ = [
    "HISTORY",
    "LOSS",
    "MAX_STEPS",
    "NORM",
    "BuiltinPolicy",
    "Decide",
    "Policy",
    "Share",
    "Targets",
    "share_to_steps",
]

HISTORY = 256
"""Number of records that a policy can look back on."""

LOSS, NORM = "train/loss/total", "grad/norm/total"

MAX_STEPS = "train/max_steps/total"
"""Total number of steps of the training; only policies see it, and only if it is known."""

Decide = Callable[[Sequence[StepRecord]], Iterable[Action]]
"""A policy as a function of the history."""

Share = Annotated[float, Field(gt=0, le=1)]
"""A share of something: above 0, at most 1."""

Targets = Annotated[Texts, Expected("a list of texts, such as ['*.weight']")]
"""Patterns of parameter names."""


@runtime_checkable
class Policy(Protocol):
    """Decides from record history alone: the same code serves training, shadow mode and replay.

    Every rank asks the policy, with the same records, and must get the same answer: no clock, no
    random number. A policy that remembers more than the history may have `state_dict()` and
    `load_state_dict(state)`; its state then travels with the checkpoint.
    """

    @property
    def name(self) -> str:
        """What events carry as `policy`."""
        ...

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """Returns actions for the newest record, ``history[-1]``, before gradients are clipped.

        Args:
            history: up to `HISTORY` records, oldest first, never empty. They hold what is known
                before a step is done: gradients, LoRA ratios, loss, learning rates as scheduled,
                and, in sampled steps, parameters and optimizer state.
        """
        ...


@dataclass(kw_only=True)
class BuiltinPolicy:
    """Base of the policies that come with the project: checked settings, and a saved memory.

    Attributes:
        memory: what the policy remembers, JSON-ready.

    Raises:
        InputError: a setting is wrong.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of action that the policy may ask for."""
    lookback: ClassVar[int] = 1
    """Number of records of the history that the policy looks at."""

    name: str = ""
    """The policy's name in events; if empty, the name that it is chosen by."""
    memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self._where, self)

    @property
    def _where(self) -> str:
        return f"policy {self.name or type(self).__name__}"

    def _refusal(self, problem: str) -> InputError:
        """Makes the error for settings that contradict each other."""
        return InputError(f"{self._where}: {problem}")

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """Patterns of metrics; the run must collect at least one metric for each."""
        return ()

    @property
    def steps_before_acting(self) -> int:
        """Number of steps before the first one at which the policy can ask for anything."""
        return 0

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the memory."""
        return copy.deepcopy(self.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the memory by a copy of `state`."""
        self.memory = copy.deepcopy(dict(state))


def share_to_steps(share: float, steps: float) -> float:
    """Converts a share of all steps to steps.

    Rounds, because 0.29 of 100 steps is 28.999999999999996 in floats.
    """
    return round(share * steps, 6) if math.isfinite(steps) else steps

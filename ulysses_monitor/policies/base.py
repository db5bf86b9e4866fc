"""What a policy is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Action, StepRecord

__all__ = [
    "HISTORY",
    "MAX_STEPS",
    "BuiltinPolicy",
    "Decide",
    "Policy",
    "check_flag",
    "check_metric",
    "check_value",
    "checked_texts",
    "share_to_steps",
]

HISTORY = 256
"""Records that a policy can look back on."""

MAX_STEPS = "train/max_steps/total"
"""How many steps the training has in all; only policies see it, where it is known."""

Decide = Callable[[Sequence[StepRecord]], Iterable[Action]]
"""A policy as a function of the history."""


@runtime_checkable
class Policy(Protocol):
    """Decides from record history alone: the same code serves training, shadow mode and replay.

    Every rank asks it, with the same records, and must get the same answer: no clock, no random
    number. What it remembers beyond the history it gives as `state_dict()` and takes back with
    `load_state_dict(state)`, both optional: they travel with the checkpoint.
    """

    @property
    def name(self) -> str:
        """What events carry as `policy`."""
        ...

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """Actions for the newest record, ``history[-1]``, before its gradients are clipped.

        Args:
            history: up to `HISTORY` records, oldest first, never empty. They hold what is known
                before a step is done: gradients, LoRA ratios, loss, learning rates as scheduled,
                and, in sampled steps, parameters and optimizer state.
        """
        ...


@dataclass(kw_only=True)
class BuiltinPolicy:
    """The base of the project's own policies: settings, and a memory that is saved.

    Attributes:
        memory: what the policy remembers, JSON-ready.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of the actions that it may ask for."""
    lookback: ClassVar[int] = 1
    """Records of the history that it looks at."""

    name: str = ""
    """What events call it; the name it is chosen by where not given."""
    memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """Patterns of metrics, of each of which the run must collect one at least."""
        return ()

    @property
    def steps_before_acting(self) -> int:
        """Steps before the first at which it can ask for anything."""
        return 0

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """A copy of the memory."""
        return copy.deepcopy(self.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the memory back."""
        self.memory = copy.deepcopy(dict(state))


def check_value(
    policy: str,
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    whole: bool = False,
    least: bool = False,
) -> None:
    """Checks a setting.

    Args:
        policy: whose.
        name: of the setting.
        value: what was given.
        low: below which, or at which, no value makes sense (0 for what must be positive).
        high: the largest value allowed.
        whole: whether it counts something; then `low` itself is allowed.
        least: whether `low` itself is allowed of what counts nothing, too.

    Raises:
        InputError: it is no such number.
    """
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or not (low <= value if whole or least else low < value) or not value <= high:
        kind = "a whole number from" if whole else "a number from" if least else "a number above"
        raise InputError(
            f"policy {policy}: {name} is {value!r}; allowed is {kind} {low:g} to {high:g}"
        )


def check_flag(policy: str, name: str, value: Any) -> None:
    """Checks a setting that is true or false.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, bool):
        raise InputError(f"policy {policy}: {name} is {value!r}; allowed is true or false")


def check_metric(policy: str, name: str, value: Any) -> None:
    """Checks a setting that names one metric.

    Raises:
        InputError: it is no name; a pattern is none.
    """
    if not isinstance(value, str) or not value or "*" in value or "?" in value:
        raise InputError(
            f"policy {policy}: {name} is {value!r}; allowed is the name of one metric, such as "
            "grad/norm/total"
        )


def checked_texts(policy: str, name: str, value: Any, such_as: str) -> tuple[str, ...]:
    """The texts of a setting that lists some, such as patterns of parameter names.

    Raises:
        InputError: it is no list, it is empty, or it holds something else.
    """
    good = isinstance(value, list | tuple) and value
    if not good or not all(isinstance(text, str) and text for text in value):
        raise InputError(
            f"policy {policy}: {name} is {value!r}; allowed is a list of texts, such as "
            f"[{such_as!r}]"
        )
    return tuple(value)


def share_to_steps(share: float, steps: float) -> float:
    """A share of all steps in steps; 0.29 of 100 are 29, which floats make 28.999999999999996."""
    return round(share * steps, 6) if math.isfinite(steps) else steps

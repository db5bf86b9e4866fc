"""Actions: what a policy asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["KINDS", "Action", "Kind", "Mode"]

Mode = Literal["off", "shadow", "active"]
"""Mode of a policy: not asked; asked and recorded; asked, recorded and carried out."""


@dataclass(frozen=True)
class Kind:
    """What actions of one kind change, and which values they take.

    Attributes:
        on: what they change: the ``gradients`` before the engine clips them, the learning
            ``rate``, the ``update`` that the optimizer makes, or the ``training`` itself.
        needed: names of the required values; None if the names are those of parameters.
        optional: names of the optional values.
    """

    on: Literal["gradients", "rate", "update", "training"]
    needed: tuple[str, ...] | None = ()
    optional: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = {
    "add_noise": Kind("gradients", ("std",)),
    "balance_lora": Kind("gradients", ("share",)),
    "centralize": Kind("gradients"),
    "clip_each": Kind("gradients", None),
    "clip_norm": Kind("gradients", ("max_norm",)),
    "clip_rows": Kind("gradients", ("ratio",)),
    "clip_value": Kind("gradients", ("limit",)),
    "freeze": Kind("gradients"),
    "lr_factor": Kind("rate", ("factor",), ("group",)),
    "roll_back": Kind("update", ("steps_back", "skip_steps")),
    "save": Kind("training"),
    "scale": Kind("gradients", ("factor",)),
    "scale_each": Kind("gradients", None),
    "skip": Kind("update"),
    "snapshot": Kind("update"),
    "stop": Kind("training"),
}
"""All kinds of actions, by name."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a policy asks for at a step, before gradients are clipped.

    These kinds change the gradients of the targets:

    - ``add_noise`` adds Gaussian noise with standard deviation ``std``;
    - ``balance_lora`` raises the smaller gradient norm of each LoRA pair, if both A and B are
      targets, to ``share`` of the larger one;
    - ``centralize`` subtracts from each row of a matrix its mean;
    - ``clip_each`` limits each parameter's gradient norm to the value under its name;
    - ``clip_norm`` limits the common norm of the targets to ``max_norm``;
    - ``clip_rows`` limits each row's norm to ``ratio`` times the norm of the weights in that row;
    - ``clip_value`` limits every element to plus and minus ``limit``;
    - ``freeze`` leaves the targets and their optimizer state unchanged in this step;
    - ``scale`` multiplies the targets by ``factor``;
    - ``scale_each`` multiplies each parameter's gradient by the value under its name.

    These kinds change the step:

    - ``lr_factor`` multiplies the scheduled learning rate by ``factor``, in the parameter group
      with number ``group`` or, without it, in all groups;
    - ``skip`` leaves weights and optimizer state unchanged; the step still counts;
    - ``snapshot`` keeps weights and optimizer state, as they enter this step, in memory;
    - ``roll_back`` replaces this step by a return to the newest snapshot that is at least
      ``steps_back`` steps old, or to the oldest one; the batches of the next ``skip_steps`` steps
      train nothing. Data, schedule and step number move on.

    These kinds act on the training at the end of the step:

    - ``save`` writes a checkpoint;
    - ``stop`` ends the training in an orderly way.

    Attributes:
        kind: what to do.
        values: its numbers, by name; finite and not negative.
        targets: shell-style patterns of parameter names; all parameters by default.
        reason: one sentence for people.
        read: the metrics that led to the action, by name.

    Raises:
        InputError: the kind is unknown, or the values are not those that it takes.
    """

    kind: str
    values: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ("*",)
    reason: str = ""
    read: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"action: kind is {self.kind!r}{nearest(self.kind, KINDS)}; "
                f"allowed: {', '.join(KINDS)}"
            )
        kind = KINDS[self.kind]
        if kind.needed is not None and set(self.values) - {*kind.optional} != {*kind.needed}:
            raise InputError(
                f"action {self.kind}: values are {sorted(self.values)}; "
                f"expected {list(kind.needed)}"
            )
        for name, value in self.values.items():
            if not math.isfinite(value) or value < 0:
                raise InputError(
                    f"action {self.kind}: {name} is {value}; expected a finite number of 0 or more"
                )

"""What a policy asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["KINDS", "Action", "Kind", "Mode"]

Mode = Literal["off", "shadow", "active"]
"""Of a policy: not asked; asked, and its answers recorded; asked, and its answers done."""


@dataclass(frozen=True)
class Kind:
    """What an action of one kind is about.

    Attributes:
        on: ``gradients`` before the engine clips them; the ``rate`` of learning; the ``update``
            that the optimizer makes of them; or the ``training`` itself.
        needed: names of its values; None where they are named by parameters.
        optional: further names.
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
"""Every kind of action, by name."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a policy asks for at a step, before gradients are clipped.

    On the targets' gradients:

    - ``add_noise``: Gaussian noise of standard deviation ``std``;
    - ``balance_lora``: of each LoRA pair with both sides among the targets, the smaller gradient's
      norm is raised to ``share`` of the larger's;
    - ``centralize``: each row of a matrix loses its mean;
    - ``clip_each``: each parameter's gradient norm is at most the value under its name;
    - ``clip_norm``: the targets' common norm is at most ``max_norm``;
    - ``clip_rows``: each row's norm is at most ``ratio`` of its weights' norm;
    - ``clip_value``: every element lies within plus and minus ``limit``;
    - ``freeze``: this step leaves the targets and their optimizer state as they are;
    - ``scale``: the targets times ``factor``;
    - ``scale_each``: each parameter's gradient times the value under its name.

    On the step:

    - ``lr_factor``: its learning rate is the scheduled one times ``factor``, in the parameter
      group numbered ``group``, or in all where it is not given;
    - ``skip``: the optimizer leaves weights and its state as they are; the step counts;
    - ``snapshot``: weights and optimizer state, as they enter this step, are kept in memory;
    - ``roll_back``: instead of this step, they become those of the newest snapshot that is at
      least ``steps_back`` steps old, or the oldest there is; the batches of the next
      ``skip_steps`` steps train nothing. Data, schedule and step number go on.

    On the training, at the end of the step:

    - ``save``: a checkpoint;
    - ``stop``: an orderly end.

    Attributes:
        kind: what to do.
        values: with which numbers.
        targets: shell-style patterns of parameter names; all by default.
        reason: one sentence for people.
        read: the metrics that led to it, by name.

    Raises:
        InputError: the kind is not known, or its values are not those it needs.
    """

    kind: str
    values: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ("*",)
    reason: str = ""
    read: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"action {self.kind!r} is not known{nearest(self.kind, KINDS)}; "
                f"allowed is one of {', '.join(KINDS)}"
            )
        kind = KINDS[self.kind]
        if kind.needed is not None and set(self.values) - {*kind.optional} != {*kind.needed}:
            raise InputError(
                f"action {self.kind}: values are {sorted(self.values)}; "
                f"needed are {list(kind.needed)}"
            )
        for name, value in self.values.items():
            if not math.isfinite(value) or value < 0:
                raise InputError(
                    f"action {self.kind}: {name} is {value}; allowed is a number from 0"
                )

"""What goes by the calendar: a learning-rate schedule, freezing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.base import (
    MAX_STEPS,
    BuiltinPolicy,
    check_value,
    checked_texts,
    share_to_steps,
)
from ulysses_monitor.records import Action, StepRecord

__all__ = ["FreezeSchedule", "WarmupCosine"]


@dataclass(kw_only=True)
class WarmupCosine(BuiltinPolicy):
    """Linear warm-up, then half a cosine; gradients are clipped only after the warm-up.

    The last step of the warm-up and the first of the cosine have the whole rate; the cosine would
    be at its lowest one step after the last, as that of transformers.

    Source: arXiv:1608.03983 (Loshchilov and Hutter, 2016) for the cosine, with the original
    design's warm-up of 3 % and norm of 1. The factor is on the scheduled rate: choose a constant
    schedule in the Trainer, and no clipping there.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"lr_factor", "clip_norm"})

    warmup: float = 0.03
    """Share of all steps, rounded up; from 1 on, a number of steps."""
    lowest: float = 0.0
    """Share of the scheduled rate that the cosine falls to."""
    max_norm: float | None = 1.0
    """The norm that is clipped to after the warm-up; None does not clip."""

    def __post_init__(self) -> None:
        what = self.name or "warmup_cosine"
        _check_steps(what, "warmup", self.warmup)
        check_value(what, "lowest", self.lowest, 0, 1, least=True)
        if self.max_norm is not None:
            check_value(what, "max_norm", self.max_norm, 0, 1e9)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (MAX_STEPS,)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        steps, done = record.get(MAX_STEPS), record.step
        if not math.isfinite(steps):
            return
        warmup = self.warmup if self.warmup >= 1 else math.ceil(share_to_steps(self.warmup, steps))
        if done <= warmup:
            factor, phase = done / warmup, "warm-up"
        else:
            part = min(1.0, (done - 1 - warmup) / max(1.0, steps - warmup))
            cosine = 0.5 * (1.0 + math.cos(math.pi * part))
            factor, phase = self.lowest + (1.0 - self.lowest) * cosine, "cosine"
            if self.max_norm is not None:
                yield Action(
                    kind="clip_norm",
                    values={"max_norm": self.max_norm},
                    reason="after the warm-up",
                )
        yield Action(
            kind="lr_factor",
            values={"factor": factor},
            reason=f"{phase}, step {done} of {steps:.0f}",
            read={MAX_STEPS: steps},
        )


@dataclass(kw_only=True)
class FreezeSchedule(BuiltinPolicy):
    """Leaves parameters as they are from one step to another, with their optimizer state."""

    action_kinds: ClassVar[frozenset[str]] = frozenset({"freeze"})

    targets: tuple[str, ...] = ()
    """Patterns of parameter names."""
    begin: float = 0.0
    """Share of all steps after which they are frozen; from 1 on, a number of steps."""
    end: float = 1.0
    """Share of all steps after which they are trained again; above 1, a number of steps."""

    def __post_init__(self) -> None:
        what = self.name or "freeze"
        self.targets = checked_texts(what, "targets", self.targets, "*embed*")
        _check_steps(what, "begin", self.begin)
        _check_steps(what, "end", self.end)
        comparable = (self.begin < 1) == (self.end <= 1)
        if self.end == 0 or (comparable and self.end <= self.begin):
            raise InputError(
                f"policy {what}: freezes nothing: begin is {self.begin:g}, end is {self.end:g}; "
                "allowed is an end behind the begin"
            )

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (MAX_STEPS,) if 0 < self.begin < 1 or self.end <= 1 else ()

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return int(self.begin)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        steps, done = record.get(MAX_STEPS), record.step
        begin = share_to_steps(self.begin, steps) if 0 < self.begin < 1 else self.begin
        end = share_to_steps(self.end, steps) if self.end <= 1 else self.end
        if begin < done <= end:
            yield Action(
                kind="freeze",
                targets=self.targets,
                reason=f"frozen until step {math.floor(end)}",
            )


def _check_steps(policy: str, name: str, value: float) -> None:
    """Checks a share of all steps, or a whole number of steps."""
    check_value(policy, name, value, 0, 1e9, least=True)
    if value > 1 and value != int(value):
        raise InputError(
            f"policy {policy}: {name} is {value:g}; allowed is a share of all steps up to 1, or a "
            "whole number of steps"
        )

"""Policies that go by the step number: a learning-rate schedule, freezing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.settings import Texts
from ulysses_monitor.policies.base import MAX_STEPS, BuiltinPolicy, share_to_steps
from ulysses_monitor.records import Action, StepRecord

__all__ = ["FreezeSchedule", "WarmupCosine"]


def _check_whole_steps(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("not a whole number of steps")
    return value


ShareOrSteps = Annotated[
    float,
    Field(ge=0, le=10**9),
    AfterValidator(_check_whole_steps),
    Expected("a share of all steps from 0 to 1, or a whole number of steps"),
]


@dataclass(kw_only=True)
class WarmupCosine(BuiltinPolicy):
    """Plans the rate: a linear warm-up, then half a cosine; clips only after the warm-up.

    The last step of the warm-up and the first of the cosine have the full rate. The cosine would
    reach its lowest value one step after the last, as in transformers.

    Source: arXiv:1608.03983 (Loshchilov and Hutter, 2016) for the cosine, with the original
    design's warm-up of 3 % and norm of 1. The factor multiplies the scheduled rate: choose a
    constant schedule and no clipping in the Trainer.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"lr_factor", "clip_norm"})

    warmup: ShareOrSteps = 0.03
    """Share of all steps, rounded up; from 1 on, a number of steps."""
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the scheduled rate that the cosine falls to."""
    max_norm: Annotated[float, Field(gt=0, le=10**9)] | None = 1.0
    """The norm to clip to after the warm-up; None does not clip."""

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
                    reason="clipped after the warm-up",
                )
        yield Action(
            kind="lr_factor",
            values={"factor": factor},
            reason=f"{phase}, step {done} of {steps:.0f}",
            read={MAX_STEPS: steps},
        )


@dataclass(kw_only=True)
class FreezeSchedule(BuiltinPolicy):
    """Freezes parameters, with their optimizer state, from one step to another."""

    action_kinds: ClassVar[frozenset[str]] = frozenset({"freeze"})

    targets: Annotated[Texts, Expected("a list of texts, such as ['*embed*']")] = ()
    """Patterns of parameter names."""
    begin: ShareOrSteps = 0.0
    """Share of all steps after which the parameters freeze; from 1 on, a number of steps."""
    end: ShareOrSteps = 1.0
    """Share of all steps after which they train again; above 1, a number of steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        comparable = (self.begin < 1) == (self.end <= 1)
        if self.end == 0 or (comparable and self.end <= self.begin):
            raise self._refusal(
                f"begin is {self.begin:g} and end is {self.end:g}, which freezes nothing; expected "
                "an end after the beginning"
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

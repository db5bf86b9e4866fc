"""Keeps the gradients of LoRA's A and B in balance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ulysses_monitor.policies.base import Share
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import lora_pairs, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["LoraBalance"]


@dataclass(kw_only=True)
class LoraBalance(BoundedPolicy):
    """Raises the smaller gradient of a LoRA pair to a share of the larger.

    Source: the original design of this project: where both norms are above 1e-8 and their ratio
    ||gB|| / ||gA|| is below 0.1 or above 10, the smaller is raised to half the larger. Once raised,
    a pair is raised until its ratio is within the bounds by the factor `recovered`. On a healthy
    run the ratio starts at infinity, because B starts at zero, and falls by itself over about a
    hundred steps; `warmup` gives it that time.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"balance_lora"})

    low: Share = 0.1
    """A ratio below this is out of balance."""
    high: Annotated[float, Field(ge=1, le=10**12)] = 10.0
    """A ratio above this is out of balance."""
    share: Share = 0.5
    """Share of the larger norm that the smaller is raised to."""
    floor: Share = 1e-8
    """A pair is left alone if one of its norms is at or below this, or not finite."""
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps at which the policy does nothing."""
    recovered: Annotated[float, Field(ge=1, le=100)] = 1.25
    """A pair is left alone again once its ratio is within the bounds by this factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low * self.recovered > self.high / self.recovered:
            raise self._refusal(
                f"recovered is {self.recovered:g}, and no ratio is above {self.low:g} and below "
                f"{self.high:g} by that factor, so balancing would never end; lower recovered"
            )

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return ("lora/grad_ratio_B_A/total", "grad/norm/param/*")

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return super().steps_before_acting + self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        if record.step <= self.warmup:
            return
        names, norms = parameter_values(record, "grad/norm")
        pairs = lora_pairs(names)
        a, b = norms[[pair.a for pair in pairs]], norms[[pair.b for pair in pairs]]
        known = (np.minimum(a, b) > self.floor) & np.isfinite(a) & np.isfinite(b)
        ratios = np.divide(b, a, out=np.ones_like(a), where=known)
        out = (ratios < self.low) | (ratios > self.high)
        raised = set(self.memory.pop("raised", ()))  # at the previous step
        near = (ratios < self.low * self.recovered) | (ratios > self.high / self.recovered)
        stays = near & np.array([pair.module in raised for pair in pairs], bool)
        if not self.should_act(bool(out.any()), bool((out | stays).any())):
            return
        chosen = [pairs[i] for i in np.flatnonzero(out | stays)]
        self.memory["raised"] = [pair.module for pair in chosen]
        metrics = [f"lora/grad_ratio_B_A/module/{pair.module}" for pair in chosen[:3]]
        yield Action(
            kind="balance_lora",
            values={"share": self.share},
            targets=tuple(names[i] for pair in chosen for i in (pair.a, pair.b)),
            reason=f"{len(chosen)} of {len(pairs)} adapter pairs are out of balance",
            read={name: record[name] for name in metrics if name in record},
        )

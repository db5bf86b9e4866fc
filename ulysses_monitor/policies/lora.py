"""Keeps the two sides of LoRA adapters in balance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.base import check_value
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import lora_pairs, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["LoraBalance"]


@dataclass(kw_only=True)
class LoraBalance(BoundedPolicy):
    """Raises the smaller gradient of a LoRA pair to a share of the larger.

    Source: the original design of this project: pairs whose ratio of norms ||gB|| / ||gA|| is
    below 0.1 or above 10, both norms above 1e-8; the smaller is raised to half the larger. Once
    raised, a pair is raised until its ratio is within the bounds by `recovered`. On a healthy run
    the ratio begins at infinity, because B starts at zero, and falls by itself over about a hundred
    steps: `warmup` leaves it that time.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"balance_lora"})

    low: float = 0.1
    """Ratios below are out of balance."""
    high: float = 10.0
    """Ratios above are out of balance."""
    share: float = 0.5
    """Of the larger norm, to which the smaller is raised."""
    floor: float = 1e-8
    """Pairs of which a norm is not above this, or not finite, are left alone."""
    warmup: int = 0
    """Steps in which nothing is done."""
    recovered: float = 1.25
    """A pair is left alone again where its ratio is within the bounds by this factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "lora_balance"
        check_value(what, "low", self.low, 0, 1)
        check_value(what, "high", self.high, 1, 1e12, least=True)
        check_value(what, "share", self.share, 0, 1)
        check_value(what, "floor", self.floor, 0, 1)
        check_value(what, "warmup", self.warmup, 0, 1_000_000, whole=True)
        check_value(what, "recovered", self.recovered, 1, 100, least=True)
        if self.low * self.recovered > self.high / self.recovered:
            raise InputError(
                f"policy {what}: never ends: no ratio is above {self.low:g} and below "
                f"{self.high:g} by a factor of {self.recovered:g}; lower recovered"
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
        raised = set(self.memory.pop("raised", ()))  # at the step before
        wavers = (ratios < self.low * self.recovered) | (ratios > self.high / self.recovered)
        stays = wavers & np.array([pair.module in raised for pair in pairs], bool)
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

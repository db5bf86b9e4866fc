"""Helps a training off the plateau that vanishing gradients keep it on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ulysses_monitor.policies.base import check_value
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import Array, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["LiftVanishing"]

_LOSS = "train/loss/total"


@dataclass(kw_only=True)
class LiftVanishing(BoundedPolicy):
    """Raises gradients that are too small to move their weights, as long as the loss has not moved.

    What is too small is told without a unit, so that it means the same for every model:

    - under SGD, an update of less than `small_update` of the weights' norm a step (rate times
      gradient norm over weight norm) is raised to `update`. That a healthy update is about 1e-3 of
      the weights is a rule of thumb (A. Karpathy, 2022); to scale each tensor's gradient by its
      weights' norm is LARS (arXiv:1708.03888, You et al., 2017).
    - under Adam, whose updates do not depend on the gradient's scale, it is a mean |g| that its
      `eps` outweighs: of less than 10 eps, raised to 100 eps, and no further, because what is
      raised for a while leaves a second moment that makes later steps small.

    It acts only while the smoothed loss has fallen by less than `gained` of its first value, and
    never again after that: a training that has converged has small gradients, too.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"scale_each"})

    small_update: float = 1e-4
    """Share of the weights' norm below which an update of SGD is too small."""
    update: float = 1e-3
    """Share that it is raised to."""
    eps: float = 1e-8
    """Adam's."""
    gained: float = 0.05
    """Share of its first value by which the loss must fall to be off the plateau."""
    warmup: int = 20
    """Steps of which the loss is only looked at."""
    largest: float = 1e6
    """Factor on a gradient."""
    longest: int = 1000
    """See `BoundedPolicy`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "lift_vanishing"
        for name in ("small_update", "update", "eps", "gained"):
            check_value(what, name, getattr(self, name), 0, 1)
        check_value(what, "warmup", self.warmup, 1, 1_000_000, whole=True)
        check_value(what, "largest", self.largest, 1, 1e12)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (
            _LOSS,
            "optim/lr/*",
            "grad/norm/param/*",
            "grad/abs_mean/param/*",
            "param/norm/param/*",
            "optim/exp_avg_sq_mean/total",
        )

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return super().steps_before_acting + self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, memory = history[-1], self.memory
        self._look(record)
        known = math.isfinite(record.get(_LOSS))
        if not known or memory["seen"] <= self.warmup or memory["moved"]:
            return
        names, _ = parameter_values(record, "grad/norm")
        factors = self._factors(record, names)
        small = np.flatnonzero(factors > 1.0)
        if self.should_act(bool(len(small)), bool(len(small))):
            yield Action(
                kind="scale_each",
                values={names[i]: float(factors[i]) for i in small},
                targets=tuple(names[i] for i in small),
                reason=f"the loss does not move, and {len(small)} gradients are too small to "
                "move their weights",
                read={_LOSS: record[_LOSS]}
                | {n: record[n] for n in (f"grad/norm/param/{names[i]}" for i in small[:3])},
            )

    def _look(self, record: StepRecord) -> None:
        memory, loss = self.memory, record.get(_LOSS)
        if not memory:
            memory |= {"seen": 0, "sum": 0.0, "smooth": 0.0, "moved": False, "adam": False}
        if "optim/exp_avg_sq_mean/total" in record:
            memory["adam"] = True
        _, weights = parameter_values(record, "param/norm")
        if len(weights) and np.isfinite(weights).all():
            memory["weights"] = weights.tolist()
        if not math.isfinite(loss):
            return  # it would stay in the sums for good, and no loss would ever have moved
        if not memory["seen"]:
            memory["smooth"] = loss
        memory["seen"] += 1
        if memory["seen"] <= 5:
            memory["sum"] += loss
        memory["smooth"] += 0.1 * (loss - memory["smooth"])
        first = memory["sum"] / min(5, memory["seen"])
        memory["moved"] |= memory["smooth"] < first - self.gained * abs(first)

    def _factors(self, record: StepRecord, names: tuple[str, ...]) -> Array:
        """By what each gradient is to be multiplied; 1 where it is not too small."""
        if self.memory["adam"]:
            _, sizes = parameter_values(record, "grad/abs_mean")
            if len(sizes) != len(names):
                return np.ones(len(names))
            small, aim = 10 * self.eps, 100 * self.eps
        else:
            _, norms = parameter_values(record, "grad/norm")
            weights = np.asarray(self.memory.get("weights", []))
            if len(weights) != len(names):
                return np.ones(len(names))
            with np.errstate(divide="ignore", invalid="ignore"):
                sizes = np.where(weights > 0, _rate(record) * norms / weights, 0.0)
            small, aim = self.small_update, self.update
        chosen = (sizes > 0) & (sizes < small)
        with np.errstate(divide="ignore"):
            return np.where(chosen, np.minimum(self.largest, aim / sizes), 1.0)


def _rate(record: StepRecord) -> float:
    rates: list[Any] = [record[name] for name in record.schema.match("optim/lr/*")]
    return float(max(rates, default=0.0))

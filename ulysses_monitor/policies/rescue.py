"""Helps a training off a plateau that vanishing gradients hold it on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ulysses_monitor.policies.base import LOSS, Share
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.columns import Array, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["LiftVanishing"]

_MOMENT = "optim/exp_avg_sq_mean/total"


@dataclass(kw_only=True)
class LiftVanishing(BoundedPolicy):
    """Raises gradients that are too small to move their weights, while the loss has not moved.

    "Too small" is relative, so that it means the same for every model:

    - Under SGD, an update of less than `small_update` of the weights' norm (rate times gradient
      norm over weight norm) is raised to `update`. A healthy update of about 1e-3 of the weights is
      a rule of thumb (A. Karpathy, 2022); scaling each tensor's gradient by its weights' norm is
      LARS (arXiv:1708.03888, You et al., 2017).
    - Under Adam, whose updates do not depend on the gradient's scale, a mean |g| below 10 `eps` is
      raised to 100 `eps`. It is raised no further, because raising leaves a second moment that
      makes later steps small.

    The policy acts only until the smoothed loss has fallen by the share `gained` of its first
    value, and never after that: a training that has converged has small gradients, too.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"scale_each"})

    small_update: Share = 1e-4
    """Share of the weights' norm below which an update of SGD is too small."""
    update: Share = 1e-3
    """Share of the weights' norm that such an update is raised to."""
    eps: Share = 1e-8
    """Adam's epsilon."""
    gained: Share = 0.05
    """Share of its first value by which the loss must fall to be off the plateau."""
    warmup: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """Steps at which the policy only watches the loss."""
    largest: Annotated[float, Field(gt=1, le=10**12)] = 1e6
    """Largest factor on a gradient."""
    longest: Annotated[int, Field(ge=1)] = 1000
    """See `BoundedPolicy`."""

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (
            LOSS,
            "optim/lr/*",
            "grad/norm/param/*",
            "grad/abs_mean/param/*",
            "param/norm/param/*",
            _MOMENT,
        )

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return super().steps_before_acting + self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, memory = history[-1], self.memory
        self._watch(record)
        known = math.isfinite(record.get(LOSS))
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
                read={LOSS: record[LOSS]}
                | {n: record[n] for n in (f"grad/norm/param/{names[i]}" for i in small[:3])},
            )

    def _watch(self, record: StepRecord) -> None:
        memory, loss = self.memory, record.get(LOSS)
        if not memory:
            memory |= {"seen": 0, "sum": 0.0, "smooth": 0.0, "moved": False, "adam": False}
        if _MOMENT in record:
            memory["adam"] = True
        _, weights = parameter_values(record, "param/norm")
        if len(weights) and np.isfinite(weights).all():
            memory["weights"] = weights.tolist()
        if not math.isfinite(loss):
            return  # it would stay in the sums, and the loss would never count as moved
        if not memory["seen"]:
            memory["smooth"] = loss
        memory["seen"] += 1
        if memory["seen"] <= 5:
            memory["sum"] += loss
        memory["smooth"] += 0.1 * (loss - memory["smooth"])
        first = memory["sum"] / min(5, memory["seen"])
        memory["moved"] |= memory["smooth"] < first - self.gained * abs(first)

    def _factors(self, record: StepRecord, names: tuple[str, ...]) -> Array:
        """Returns the factor on each gradient [P]; 1 for those that are not too small."""
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
    rates = [record[name] for name in record.schema.match("optim/lr/*")]
    return max(rates, default=0.0)

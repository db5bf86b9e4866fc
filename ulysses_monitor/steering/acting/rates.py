"""Factors on learning rates that leave the scheduler's own rates alone.

A factor that is multiplied into ``group["lr"]`` for good is either lost at a scheduler's next step
or compounds with it, depending on the scheduler. So a factor applies during one optimizer step
only: before the step, each group's rate becomes the scheduled one times the factor; after it, the
rate is the scheduled one again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["RateFactors", "scheduled_rates"]


@dataclass
class _Rates:
    """An optimizer's scheduled rates, and the factors that each of several monitors applies."""

    scheduled: list[Any] = field(default_factory=list)
    factors: dict[int, list[float]] = field(default_factory=dict)


_CHANGED: WeakKeyDictionary[torch.optim.Optimizer, _Rates] = WeakKeyDictionary()


class RateFactors:
    """Factors of the coming step; factors of several monitors on one optimizer multiply.

    Args:
        optimizer: the optimizer whose parameter groups are changed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def apply(self, factors: Mapping[int | None, float]) -> None:
        """Multiplies the rates until `restore`.

        Args:
            factors: factors by group; the key None means all groups. If both apply, they multiply.
        """
        self.restore()
        if not factors:
            return
        groups = self._optimizer.param_groups
        rates = _CHANGED.setdefault(self._optimizer, _Rates())
        rates.scheduled = rates.scheduled or [_copy(group["lr"]) for group in groups]
        everywhere = factors.get(None, 1.0)
        rates.factors[id(self)] = [everywhere * factors.get(i, 1.0) for i in range(len(groups))]
        self._set(rates)

    def restore(self) -> None:
        """Removes its factors; without any left, the rates are the scheduled ones."""
        rates = _CHANGED.get(self._optimizer)
        if rates is None or rates.factors.pop(id(self), None) is None:
            return
        self._set(rates)
        if not rates.factors:
            del _CHANGED[self._optimizer]

    def _set(self, rates: _Rates) -> None:
        # DeepSpeed shows its groups one at a time within a step, never here.
        for i, (group, rate) in enumerate(
            zip(self._optimizer.param_groups, rates.scheduled, strict=True)
        ):
            for factors in rates.factors.values():
                rate = rate * factors[i]
            if isinstance(group["lr"], Tensor):  # a compiled step holds on to the tensor
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate


def scheduled_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Returns the rates of an optimizer's groups without the factors that apply at the moment."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner  # accelerate's wrapper
    changed = _CHANGED.get(optimizer)
    groups = [group["lr"] for group in optimizer.param_groups]
    return [float(rate) for rate in (groups if changed is None else changed.scheduled)]


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate

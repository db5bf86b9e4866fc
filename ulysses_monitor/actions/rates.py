"""Factors on learning rates, that leave the scheduler its rates.

A factor that is multiplied into ``group["lr"]`` for good is either lost at a scheduler's next step
or compounds with it, by the scheduler's kind. So a factor is there for the time of one optimizer
step only: before it, each group's rate is the scheduled one times the factor; after it, the
scheduled one again, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["RateFactors"]


class RateFactors:
    """Factors of the coming step.

    Args:
        optimizer: whose parameter groups are changed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self._scheduled: list[Any] = []

    def apply(self, factors: Mapping[int | None, float]) -> None:
        """Multiplies the rates until `restore`.

        Args:
            factors: by group; None for all groups. Where a group has both, they multiply.
        """
        self.restore()
        if not factors:
            return
        everywhere = factors.get(None, 1.0)
        for i, group in enumerate(self._groups):
            rate = group["lr"]
            self._scheduled.append(rate.clone() if isinstance(rate, Tensor) else rate)
            _set(group, rate * (everywhere * factors.get(i, 1.0)))

    def restore(self) -> None:
        """Gives the groups their scheduled rates back; nothing where none was changed."""
        for group, rate in zip(self._groups, self._scheduled, strict=False):
            _set(group, rate)
        self._scheduled = []


def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):  # a compiled or captured step holds on to the tensor
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate

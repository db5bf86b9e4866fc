"""Gathers results of slices, with the gradients that a loss on whole rows needs.

Legend: B rows, S tokens of a whole row, s = S / n tokens of a slice, n ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_core.parallel.groups import SequenceGroup

__all__ = ["gather_tokens", "sum_over_group"]


def gather_tokens(values: Tensor, group: SequenceGroup) -> Tensor:
    """Gathers what each rank has of a slice into whole rows.

    Every rank must compute the same loss from the result: in the backward pass each takes the
    gradient of its own slice times the number of ranks, and no gradients are exchanged.

    Args:
        values: [B, s, ...] of this rank's slice.
        group: the sequence group.

    Returns:
        [B, S, ...].
    """
    rows: Tensor = _GatherTokens.apply(values, group)  # type: ignore[no-untyped-call]
    return rows


def sum_over_group(value: Tensor, group: SequenceGroup) -> Tensor:
    """Sums a scalar over the group; backward as in `gather_tokens`."""
    total: Tensor = _SumOverGroup.apply(value, group)  # type: ignore[no-untyped-call]
    return total


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        slices = [torch.empty_like(values) for _ in range(group.size)]
        dist.all_gather(slices, values.contiguous(), group=group.group)
        return torch.cat(slices, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        own = grads[0].chunk(ctx.group.size, dim=1)[ctx.group.rank]
        return own * ctx.group.size, None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: SequenceGroup) -> Tensor:
        ctx.size = group.size
        total = value.clone()
        dist.all_reduce(total, group=group.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None

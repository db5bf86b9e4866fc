"""The Ulysses exchange: sequence-sharded heads to head-sharded sequences and back.

Legend: B rows, S tokens of a whole row, s = S / n tokens of a slice, n ranks in the group,
H query heads in all, K key/value heads in all, h and k those that one rank attends with, D width
of a head.

One all-to-all carries q, k and v together, one carries the output back. Heads need not divide by
n: each rank takes a contiguous run of query heads, runs differ by one head at most, and a rank is
sent the key/value heads that its query heads use and no others. (DeepSpeed-Ulysses,
arXiv 2309.14509.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_core.parallel.groups import SequenceGroup

__all__ = ["HeadPlan", "gather_heads", "plan_heads", "scatter_heads"]


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each rank attends with.

    Attributes:
        query: per rank, the half-open run of query heads.
        key: per rank, the half-open run of key/value heads that those use.
        ratio: query heads per key/value head in the model.
    """

    query: tuple[tuple[int, int], ...]
    key: tuple[tuple[int, int], ...]
    ratio: int

    def counts(self) -> list[int]:
        """Heads of q, k and v together that each rank is sent."""
        return [
            (q1 - q0) + 2 * (k1 - k0)
            for (q0, q1), (k0, k1) in zip(self.query, self.key, strict=True)
        ]

    def key_of_query(self, rank: int) -> list[int]:
        """For each query head of `rank`, the index of its key head among the rank's own."""
        (q0, q1), (k0, _) = self.query[rank], self.key[rank]
        return [q // self.ratio - k0 for q in range(q0, q1)]


@lru_cache
def plan_heads(heads: int, key_heads: int, ranks: int) -> HeadPlan:
    """Shares `heads` query heads and `key_heads` key/value heads out to `ranks` ranks."""
    ratio = heads // key_heads
    share, rest = divmod(heads, ranks)
    starts = [r * share + min(r, rest) for r in range(ranks + 1)]
    query = tuple((starts[r], starts[r + 1]) for r in range(ranks))
    key = tuple((a // ratio, (b - 1) // ratio + 1) if a < b else (0, 0) for a, b in query)
    return HeadPlan(query, key, ratio)


def scatter_heads(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Trades slices of all heads for whole rows of this rank's heads.

    Args:
        q: [B, H, s, D].
        k: [B, K, s, D].
        v: [B, K, s, D].
        plan: shares of the heads.
        group: the sequence group.

    Returns:
        q [B, h, S, D], k and v [B, k, S, D].
    """
    n = len(plan.query)
    # [B, H, s, D] -> [H, B, s, D]: runs of heads become contiguous, one copy builds the buffer.
    heads_q, heads_k, heads_v = (t.transpose(0, 1) for t in (q, k, v))
    runs = [
        run
        for (q0, q1), (k0, k1) in zip(plan.query, plan.key, strict=True)
        for run in (heads_q[q0:q1], heads_k[k0:k1], heads_v[k0:k1])
    ]
    counts = plan.counts()
    own = counts[group.rank]
    received = _exchange(torch.cat(runs), counts, [own] * n, group)
    # [n * own, B, s, D] -> [n, own, B, s, D] -> [B, own, n, s, D] -> [B, own, S, D]
    rows = received.view(n, own, *received.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)
    (q0, q1), (k0, k1) = plan.query[group.rank], plan.key[group.rank]
    return tuple(rows.split([q1 - q0, k1 - k0, k1 - k0], dim=1))


def gather_heads(out: Tensor, plan: HeadPlan, group: SequenceGroup) -> Tensor:
    """Trades whole rows of this rank's heads for slices of all heads.

    Args:
        out: [B, h, S, D].
        plan: shares of the heads.
        group: the sequence group.

    Returns:
        [B, s, H, D], the layout that transformers' attention functions return.
    """
    n = len(plan.query)
    shares = [q1 - q0 for q0, q1 in plan.query]
    # [B, h, S, D] -> [B, h, n, s, D] -> [n, h, B, s, D] -> [n * h, B, s, D]
    slices = out.unflatten(2, (n, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
    received = _exchange(slices, [shares[group.rank]] * n, shares, group)
    return received.permute(1, 2, 0, 3)  # [H, B, s, D] -> [B, s, H, D]


class _AllToAll(torch.autograd.Function):
    """All-to-all over dim 0 with uneven splits; its gradient is the exchange the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: SequenceGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: SequenceGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    with group.meter.measure(x, sent[group.rank]):
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group.group)
    return out


def _exchange(x: Tensor, sent: list[int], received: list[int], group: SequenceGroup) -> Tensor:
    exchanged: Tensor = _AllToAll.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged

"""The Ulysses exchange: sequence-sharded heads to head-sharded sequences and back.

Legend: B rows, S tokens of a whole row, s = S / n tokens of a slice, n ranks in the group,
H query heads in all, K key/value heads in all, h and k those that one rank attends with, D width
of a head.

One all-to-all carries q, k and v together, one carries the output back. Heads need not divide by
n: each rank takes a contiguous run of query heads, runs differ by one head at most, and a rank is
sent the key/value heads that its query heads use and no others. (DeepSpeed-Ulysses,
arXiv 2309.14509.)

What travels has tokens outermost: a chunk for or from one rank is [s, B, heads, D]. So the chunks
from all ranks, as they arrive, are whole rows [S, B, h, D], and slices of those are chunks: one
copy packs, one unpacks, and whole rows are never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def key_of_query(self, rank: int) -> list[int]:
        """For each query head of `rank`, the index of its key head among the rank's own."""
        (q0, q1), (k0, _) = self.query[rank], self.key[rank]
        return [q // self.ratio - k0 for q in range(q0, q1)]

    def sent(self, rank: int, tokens: int) -> int:
        """Heads' vectors that `rank` sends to others in a layer's forward pass.

        As many go back in its backward pass.

        Args:
            rank: whose.
            tokens: of a slice, in all rows together.
        """
        others = [r for r in range(len(self.query)) if r != rank]
        heads = sum(
            (q1 - q0) + 2 * (k1 - k0)
            for (q0, q1), (k0, k1) in ((self.query[r], self.key[r]) for r in others)
        )
        own = self.query[rank][1] - self.query[rank][0]
        return tokens * (heads + own * len(others))


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
        q [B, h, S, D], k and v [B, k, S, D], views with tokens outermost.
    """
    rows: tuple[Tensor, Tensor, Tensor] = _Scatter.apply(q, k, v, plan, group)  # type: ignore[no-untyped-call]
    return rows


def gather_heads(out: Tensor, plan: HeadPlan, group: SequenceGroup) -> Tensor:
    """Trades whole rows of this rank's heads for slices of all heads.

    Args:
        out: [B, h, S, D].
        plan: shares of the heads.
        group: the sequence group.

    Returns:
        [B, s, H, D], the layout that transformers' attention functions return.
    """
    slices: Tensor = _Gather.apply(out, plan, group)  # type: ignore[no-untyped-call]
    return slices


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, group: SequenceGroup
    ) -> tuple[Tensor, ...]:
        ctx.runs = (plan.query, plan.key, plan.key)
        ctx.group = group
        return tuple(_to_rows((q, k, v), ctx.runs, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(g.transpose(1, 2) for g in _to_slices(grads, ctx.runs, ctx.group)), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, plan: HeadPlan, group: SequenceGroup) -> Tensor:
        ctx.runs = (plan.query,)
        ctx.group = group
        return _to_slices((out,), ctx.runs, group)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        slices = [grads[0].transpose(1, 2)]
        return _to_rows(slices, ctx.runs, ctx.group)[0], None, None


Runs = Sequence[tuple[tuple[int, int], ...]]
"""For each tensor that travels, the half-open run of heads of each rank."""


def _to_rows(slices: Sequence[Tensor], runs: Runs, group: SequenceGroup) -> list[Tensor]:
    """Slices of all heads [B, H, s, D] to whole rows of this rank's [B, h, S, D]."""
    batch, _, tokens, width = slices[0].shape
    heads = _heads_by_rank(runs)
    sent = _workspace("sent", slices[0], tokens * batch * sum(heads) * width)
    for i, lo, hi, part in _parts(sent, runs, (tokens, batch, width)):
        part.copy_(slices[i][:, lo:hi].permute(2, 0, 1, 3))  # [B, h, s, D] -> [s, B, h, D]
    received = sent.new_empty(tokens * group.size, batch, heads[group.rank], width)
    sizes = [tokens * batch * width * h for h in heads]
    _all_to_all(received, sent, [sizes[group.rank]] * group.size, sizes, group)
    own = [run[group.rank][1] - run[group.rank][0] for run in runs]
    # [S, B, h, D] -> [B, h, S, D]
    return [part.permute(1, 2, 0, 3) for part in received.split(own, dim=2)]


def _to_slices(rows: Sequence[Tensor], runs: Runs, group: SequenceGroup) -> list[Tensor]:
    """Whole rows of this rank's heads [B, h, S, D] to slices of all heads [B, s, H, D].

    What several ranks have of one head is added up: gradients of the key/value heads they share.
    """
    batch, _, whole, width = rows[0].shape
    tokens = whole // group.size
    parts = [part.permute(2, 0, 1, 3) for part in rows]  # [B, h, S, D] -> [S, B, h, D]
    sent = parts[0]
    if len(parts) > 1 or not sent.is_contiguous():
        numel = sum(part.numel() for part in parts)
        sent = _workspace("sent", sent, numel).view(whole, batch, -1, width)
        torch.cat(parts, dim=2, out=sent)
    sizes = [tokens * batch * width * h for h in _heads_by_rank(runs)]
    received = _workspace("received", sent, sum(sizes))
    _all_to_all(received, sent, sizes, [sizes[group.rank]] * group.size, group)
    heads = [max(hi for _, hi in run) for run in runs]
    slices = [sent.new_empty(batch, tokens, h, width) for h in heads]
    filled = [0] * len(runs)
    for i, lo, hi, part in _parts(received, runs, (tokens, batch, width)):
        rows_of_part = part.transpose(0, 1)  # [s, B, h, D] -> [B, s, h, D]
        shared = max(0, filled[i] - lo)
        slices[i][:, :, lo : lo + shared] += rows_of_part[:, :, :shared]
        slices[i][:, :, lo + shared : hi] = rows_of_part[:, :, shared:]
        filled[i] = hi
    return slices


_workspaces: dict[tuple[str, torch.dtype], Tensor] = {}


def _workspace(name: str, like: Tensor, numel: int) -> Tensor:
    """Room for what is gone after an exchange [numel].

    On a CPU it is kept: to get as much memory anew takes as long as to send it. On a GPU torch
    keeps it itself.
    """
    if like.device.type != "cpu":
        return like.new_empty(numel)
    key = name, like.dtype
    if key not in _workspaces or _workspaces[key].numel() < numel:
        _workspaces[key] = like.new_empty(numel)
    return _workspaces[key][:numel]


def _heads_by_rank(runs: Runs) -> list[int]:
    return [sum(hi - lo for lo, hi in each) for each in zip(*runs, strict=True)]


def _parts(
    flat: Tensor, runs: Runs, shape: tuple[int, int, int]
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Tensor, first and last head, and view [s, B, heads, D] of each part of the ranks' chunks."""
    tokens, batch, width = shape
    sizes = [tokens * batch * width * heads for heads in _heads_by_rank(runs)]
    for rank, chunk in enumerate(flat.split(sizes)):
        heads = [run[rank][1] - run[rank][0] for run in runs]
        parts = chunk.view(tokens, batch, sum(heads), width).split(heads, dim=2)
        for i, part in enumerate(parts):
            if heads[i]:
                yield i, *runs[i][rank], part


def _all_to_all(
    received: Tensor, sent: Tensor, take: list[int], give: list[int], group: SequenceGroup
) -> None:
    """One collective; `take` and `give` are elements from and for each rank."""
    with group.meter.measure(sent, give[group.rank]):
        dist.all_to_all_single(received.view(-1), sent.view(-1), take, give, group=group.group)

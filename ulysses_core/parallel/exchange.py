"""The Ulysses exchange: from slices of all heads to whole rows of some heads, and back.

Legend: B rows, S tokens of a whole row, s = S / n tokens of a slice, n ranks in the group,
H query heads, K key/value heads, h and k those of one rank, D width of a head.

One all-to-all sends q, k and v together, and one sends the output back. The number of heads need
not be a multiple of n: each rank gets consecutive query heads, the ranks' numbers of heads differ
by at most one, and a rank receives only the key/value heads that its query heads use
(DeepSpeed-Ulysses, arXiv 2309.14509).

The buffers have tokens outermost: the chunk for or from one rank is [s, B, heads, D]. Received
chunks thus form whole rows [S, B, h, D], and slices of whole rows are chunks to send. One copy
packs, one unpacks, and whole rows are never copied.
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
    """Which heads each rank gets.

    Attributes:
        query: for each rank, its half-open range of query heads.
        key: for each rank, the half-open range of key/value heads that its query heads use.
        ratio: query heads per key/value head in the model.
    """

    query: tuple[tuple[int, int], ...]
    key: tuple[tuple[int, int], ...]
    ratio: int

    def key_indices(self, rank: int) -> list[int]:
        """Returns, for each query head of `rank`, the index of its key head among the rank's."""
        (q0, q1), (k0, _) = self.query[rank], self.key[rank]
        return [q // self.ratio - k0 for q in range(q0, q1)]

    def count_sent(self, rank: int, tokens: int) -> int:
        """Returns how many vectors [D] `rank` sends to other ranks in a layer's forward pass.

        The backward pass sends as many.

        Args:
            rank: the sending rank.
            tokens: tokens of its slices of all rows, B * s.
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
    """Distributes `heads` query heads and `key_heads` key/value heads over `ranks` ranks."""
    ratio = heads // key_heads
    share, rest = divmod(heads, ranks)
    starts = [r * share + min(r, rest) for r in range(ranks + 1)]
    query = tuple((starts[r], starts[r + 1]) for r in range(ranks))
    key = tuple((a // ratio, (b - 1) // ratio + 1) if a < b else (0, 0) for a, b in query)
    return HeadPlan(query, key, ratio)


def scatter_heads(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchanges slices of all heads for whole rows of this rank's heads.

    Args:
        q: [B, H, s, D].
        k: [B, K, s, D].
        v: [B, K, s, D].
        plan: the heads of each rank.
        group: the sequence group.

    Returns:
        q [B, h, S, D], k and v [B, k, S, D]; views of buffers with tokens outermost.
    """
    rows: tuple[Tensor, Tensor, Tensor] = _Scatter.apply(q, k, v, plan, group)  # type: ignore[no-untyped-call]
    return rows


def gather_heads(out: Tensor, plan: HeadPlan, group: SequenceGroup) -> Tensor:
    """Exchanges whole rows of this rank's heads for slices of all heads.

    Args:
        out: [B, h, S, D].
        plan: the heads of each rank.
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
        ctx.head_ranges = (plan.query, plan.key, plan.key)
        ctx.group = group
        return tuple(_to_rows((q, k, v), ctx.head_ranges, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slices = _to_slices(grads, ctx.head_ranges, ctx.group)
        return *(g.transpose(1, 2) for g in slices), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, plan: HeadPlan, group: SequenceGroup) -> Tensor:
        ctx.head_ranges = (plan.query,)
        ctx.group = group
        return _to_slices((out,), ctx.head_ranges, group)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        slices = [grads[0].transpose(1, 2)]
        return _to_rows(slices, ctx.head_ranges, ctx.group)[0], None, None


HeadRanges = Sequence[tuple[tuple[int, int], ...]]
"""For each exchanged tensor, the half-open range of heads of each rank."""


def _to_rows(slices: Sequence[Tensor], ranges: HeadRanges, group: SequenceGroup) -> list[Tensor]:
    """Turns slices of all heads [B, H, s, D] into whole rows of this rank's heads [B, h, S, D]."""
    batch, _, tokens, width = slices[0].shape
    heads = _heads_by_rank(ranges)
    sent = _get_workspace("sent", slices[0], tokens * batch * sum(heads) * width)
    for i, lo, hi, part in _split_chunks(sent, ranges, (tokens, batch, width)):
        part.copy_(slices[i][:, lo:hi].permute(2, 0, 1, 3))  # [B, h, s, D] -> [s, B, h, D]
    received = sent.new_empty(tokens * group.size, batch, heads[group.rank], width)
    sizes = [tokens * batch * width * h for h in heads]
    _all_to_all(received, sent, [sizes[group.rank]] * group.size, sizes, group)
    own_heads = [heads_of[group.rank][1] - heads_of[group.rank][0] for heads_of in ranges]
    # [S, B, h, D] -> [B, h, S, D]
    return [part.permute(1, 2, 0, 3) for part in received.split(own_heads, dim=2)]


def _to_slices(rows: Sequence[Tensor], ranges: HeadRanges, group: SequenceGroup) -> list[Tensor]:
    """Turns whole rows of this rank's heads [B, h, S, D] into slices of all heads [B, s, H, D].

    Sums what several ranks return for one head: the gradients of key/value heads that they share.
    """
    batch, _, size, width = rows[0].shape
    tokens = size // group.size
    parts = [part.permute(2, 0, 1, 3) for part in rows]  # [B, h, S, D] -> [S, B, h, D]
    sent = parts[0]
    if len(parts) > 1 or not sent.is_contiguous():
        numel = sum(part.numel() for part in parts)
        sent = _get_workspace("sent", sent, numel).view(size, batch, -1, width)
        torch.cat(parts, dim=2, out=sent)
    sizes = [tokens * batch * width * h for h in _heads_by_rank(ranges)]
    received = _get_workspace("received", sent, sum(sizes))
    _all_to_all(received, sent, sizes, [sizes[group.rank]] * group.size, group)
    heads = [max(hi for _, hi in heads_of) for heads_of in ranges]
    slices = [sent.new_empty(batch, tokens, h, width) for h in heads]
    filled = [0] * len(ranges)
    for i, lo, hi, part in _split_chunks(received, ranges, (tokens, batch, width)):
        rows_of_part = part.transpose(0, 1)  # [s, B, h, D] -> [B, s, h, D]
        shared = max(0, filled[i] - lo)
        slices[i][:, :, lo : lo + shared] += rows_of_part[:, :, :shared]
        slices[i][:, :, lo + shared : hi] = rows_of_part[:, :, shared:]
        filled[i] = hi
    return slices


_workspaces: dict[tuple[str, torch.dtype], Tensor] = {}


def _get_workspace(name: str, like: Tensor, numel: int) -> Tensor:
    """Returns a buffer [numel] whose content is needed only during an exchange.

    On a CPU buffers are reused, because allocating one takes as long as sending it. On a GPU
    torch's allocator reuses memory itself.
    """
    if like.device.type != "cpu":
        return like.new_empty(numel)
    key = name, like.dtype
    if key not in _workspaces or _workspaces[key].numel() < numel:
        _workspaces[key] = like.new_empty(numel)
    return _workspaces[key][:numel]


def _heads_by_rank(ranges: HeadRanges) -> list[int]:
    return [sum(hi - lo for lo, hi in of_rank) for of_rank in zip(*ranges, strict=True)]


def _split_chunks(
    flat: Tensor, ranges: HeadRanges, shape: tuple[int, int, int]
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Splits a buffer by rank and exchanged tensor.

    Yields:
        The tensor's index, its first head and the head after its last, and a view
        [s, B, heads, D] of the buffer.
    """
    tokens, batch, width = shape
    sizes = [tokens * batch * width * heads for heads in _heads_by_rank(ranges)]
    for rank, chunk in enumerate(flat.split(sizes)):
        heads = [heads_of[rank][1] - heads_of[rank][0] for heads_of in ranges]
        parts = chunk.view(tokens, batch, sum(heads), width).split(heads, dim=2)
        for i, part in enumerate(parts):
            if heads[i]:
                yield i, *ranges[i][rank], part


def _all_to_all(
    received: Tensor,
    sent: Tensor,
    received_sizes: list[int],
    sent_sizes: list[int],
    group: SequenceGroup,
) -> None:
    """Runs one all-to-all; the sizes are the elements from and for each rank."""
    with group.meter.measure(sent, sent_sizes[group.rank]):
        dist.all_to_all_single(
            received.view(-1), sent.view(-1), received_sizes, sent_sizes, group=group.group
        )

"""Sums over local shards, exact enough to compare engines, in bounded memory.

On the CPU, the kernels of this project read memory once. Without Numba, which compiles them, torch
adds in float64, a piece at a time. On a GPU, whose memory is ten times as fast, a few torch
operations do, which add as trees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ulysses_monitor.probes.compiled import KERNELS

__all__ = [
    "GPU_PIECE",
    "PIECE",
    "finite_statistics",
    "index_tensor",
    "split_pieces",
    "statistics",
    "statistics_by_torch",
    "statistics_in_float64",
]

PIECE = 1 << 18
"""Elements per piece where an operation needs a temporary: 1 MiB in float32, so it fits a cache."""

GPU_PIECE = 1 << 24
"""Elements per piece on a GPU: large, but float32 can still count that many one by one."""


@lru_cache(maxsize=64)
def index_tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns `indices` on `device`; cached, because the copy would wait for a GPU each step."""
    return torch.tensor(indices, dtype=torch.long, device=device)


def statistics(tensors: Sequence[Tensor]) -> Tensor:
    """Returns sum of squares, sum of magnitudes, largest magnitude and non-zeros of each tensor.

    Args:
        tensors: dense tensors of any shape and floating type, on one device.

    Returns:
        float64 tensor [4, len(tensors)] on their device; a column is not finite if its tensor is
        not.
    """
    if tensors and tensors[0].device.type != "cpu":
        return statistics_by_torch(tensors)
    found: Tensor = (statistics_in_float64 if KERNELS is None else KERNELS.statistics)(tensors)
    return found


def statistics_in_float64(tensors: Sequence[Tensor]) -> Tensor:
    """Does what `statistics` does, for a CPU without Numba: exact, but slower."""
    result = torch.zeros(4, len(tensors), dtype=torch.float64)
    for i, tensor in enumerate(tensors):
        # An empty tensor has no maximum.
        for piece in split_pieces(tensor.detach()) if tensor.numel() else ():
            magnitudes = piece.double().abs()
            result[2, i] = torch.maximum(result[2, i], magnitudes.amax())
            result[1, i] += magnitudes.sum()
            result[3, i] += magnitudes.count_nonzero()
            result[0, i] += magnitudes.square_().sum()
    return result


def statistics_by_torch(tensors: Sequence[Tensor]) -> Tensor:
    """Does what `statistics` does, for a GPU: a few kernels over all tensors, without waiting."""
    device = tensors[0].device
    owners, pieces = [], []
    for i, tensor in enumerate(tensors):
        # An empty tensor has no maximum.
        for piece in split_pieces(tensor, GPU_PIECE) if tensor.numel() else ():
            owners.append(i)
            pieces.append(piece)
    result = torch.zeros(4, len(tensors), dtype=torch.float64, device=device)
    if not pieces:
        return result
    found, owner = _by_foreach(pieces), index_tensor(tuple(owners), device)
    result.index_add_(1, owner, found)
    result[2].zero_().scatter_reduce_(0, owner, found[2], "amax")
    return result


def split_pieces(tensor: Tensor, size: int = PIECE) -> Iterator[Tensor]:
    """Splits the tensor's elements into flat pieces of at most `size` elements."""
    flat = tensor.reshape(-1)
    return iter((flat,) if flat.numel() <= size else flat.split(size))


def _by_foreach(pieces: list[Tensor]) -> Tensor:
    # Half precision is summed in float32, because fp16 overflows at 65,504 and bf16 has 8 bits.
    exact = any(piece.dtype == torch.float64 for piece in pieces)
    accumulator = torch.float64 if exact else torch.float32
    by_order = [torch._foreach_norm(pieces, order, accumulator) for order in (2, 1, float("inf"))]
    rows = [torch.stack(list(norms)).double() for norms in by_order]
    nonzero = [torch.linalg.vector_norm(p, 0, dtype=accumulator) for p in pieces]
    return torch.stack([rows[0].square(), rows[1], rows[2], torch.stack(nonzero).double()])


def finite_statistics(tensors: Sequence[Tensor]) -> Tensor:
    """Does what `statistics` does over finite elements, in float64, and counts the others.

    Returns:
        float64 tensor [5, len(tensors)] on their device.
    """
    if not tensors:
        return torch.zeros(5, 0, dtype=torch.float64)
    return torch.stack([_finite_statistics(tensor) for tensor in tensors], dim=1)


def _finite_statistics(tensor: Tensor) -> Tensor:
    rows = []
    for piece in split_pieces(tensor):
        bad = ~piece.isfinite()
        finite = piece.double().abs().masked_fill_(bad, 0.0)
        nonzero = (piece != 0).sum()
        rows.append([finite.square().sum(), finite.sum(), finite.amax(), nonzero, bad.sum()])
    by_piece = torch.stack([torch.stack([v.double() for v in row]) for row in rows])
    total: Tensor = by_piece.sum(0)
    total[2] = by_piece[:, 2].amax()
    return total

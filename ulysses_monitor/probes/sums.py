"""Sums over local shards that are exact enough to compare engines by, in bounded memory.

torch's fp32 norm on CPU adds naively: its relative error is 4e-3 at 50 million elements. Here each
piece of a tensor is reduced by torch's kernels and pieces are added in float64: about the same
speed, an error near 1e-7. torch's `sum` adds pairwise and needs no such help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "PIECE",
    "careful_statistics",
    "element_sums",
    "index_tensor",
    "pieces_of",
    "square_sum",
    "square_sums",
    "statistics",
]

BLOCK = 4096
"""Elements that are added in the tensor's own precision before float64 takes over."""

PIECE = 1 << 18
"""Elements of a piece on the CPU: 1 MiB, which stays in the cache while it is read four times."""

_GPU_PIECE = 1 << 24
"""Elements of a piece on a GPU: float32 still counts them one by one."""


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of each tensor.

    Args:
        tensors: dense tensors of any shape and floating type, on one device.

    Returns:
        float64 tensor [len(tensors)] on their device; NaN or Inf where a tensor holds one.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    sums = torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].device)
    for accumulator in (torch.float32, torch.float64):
        norms, owners = _block_norms(tensors, accumulator)
        if norms:
            spread = [i for i, part in zip(owners, norms, strict=True) for _ in range(len(part))]
            index = index_tensor(tuple(spread), sums.device)
            sums.index_add_(0, index, torch.cat(norms).double().square())
    return sums


@lru_cache(maxsize=64)
def index_tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """`indices` on `device`; kept, because copying them there would wait for a GPU each step."""
    return torch.tensor(indices, dtype=torch.long, device=device)


def _block_norms(
    tensors: Sequence[Tensor], accumulator: torch.dtype
) -> tuple[list[Tensor], list[int]]:
    """Norms of blocks of the tensors that `accumulator` is for, and which tensor each is of."""
    norms, owners, rests, rest_owners = [], [], [], []
    for i, tensor in enumerate(tensors):
        if _accumulator(tensor) != accumulator:
            continue
        flat = tensor.reshape(-1)
        whole = flat.numel() - flat.numel() % BLOCK
        if whole:
            rows = flat[:whole].view(-1, BLOCK)
            norms.append(torch.linalg.vector_norm(rows, dim=-1, dtype=accumulator))
            owners.append(i)
        if whole < flat.numel():
            rests.append(flat[whole:])
            rest_owners.append(i)
    if rests:
        norms += [norm.view(1) for norm in torch._foreach_norm(rests, 2, accumulator)]
    return norms, owners + rest_owners


def element_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the elements of each tensor; arguments and result as in `square_sums`."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([t.sum(dtype=_accumulator(t)).double() for t in tensors])


def statistics(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares, sum and maximum of absolute values, and count of non-zeros of each tensor.

    On the CPU a piece is read from memory once and from the cache for the rest.

    Args:
        tensors: dense tensors of any shape and floating type, on one device.

    Returns:
        float64 tensor [4, len(tensors)] on their device; not finite where a tensor is not.
    """
    if not tensors:
        return torch.zeros(4, 0, dtype=torch.float64)
    device = tensors[0].device
    size = PIECE if device.type == "cpu" else _GPU_PIECE
    owners, pieces = [], []
    for i, tensor in enumerate(tensors):
        for piece in pieces_of(tensor, size):
            owners.append(i)
            pieces.append(piece)
    found = _on_cpu(pieces) if device.type == "cpu" else _on_gpu(pieces)
    if len(pieces) == len(tensors):
        return found
    owner = index_tensor(tuple(owners), device)
    result = torch.zeros(4, len(tensors), dtype=torch.float64, device=device)
    result.index_add_(1, owner, found)
    result[2] = 0.0
    result[2].scatter_reduce_(0, owner, found[2], "amax")
    return result


def pieces_of(tensor: Tensor, size: int = PIECE) -> Iterator[Tensor]:
    """The tensor's elements, flat, at most `size` at a time."""
    flat = tensor.reshape(-1)
    return iter((flat,) if flat.numel() <= size else flat.split(size))


def _on_cpu(pieces: list[Tensor]) -> Tensor:
    """[4, pieces], each piece by way of one buffer of its accumulator's type.

    NumPy's minimum and maximum of a float32 array are the faster ones. Where the smallest
    magnitude is not zero, nothing is, and the zeros need not be counted.
    """
    buffers = {d: torch.empty(PIECE, dtype=d) for d in {_accumulator(p) for p in pieces}}
    norms, owners, sums, rest = [], [], [], []
    for i, piece in enumerate(pieces):
        size = piece.numel()
        buffer = buffers[_accumulator(piece)][:size]
        # Half precision is summed in float32: fp16 overflows at 65,504, bf16 has 8 bits.
        torch.abs(piece if piece.dtype == buffer.dtype else buffer.copy_(piece), out=buffer)
        for norm in _norms_of_blocks(buffer):
            norms.append(norm)
            owners += [i] * len(norm)
        sums.append(buffer.sum())
        array = buffer.numpy()
        low, high = (array.min(), array.max()) if size else (0.0, 0.0)
        rest.append((high, size if low > 0 else np.count_nonzero(array != 0)))
    squares = torch.zeros(len(pieces), dtype=torch.float64)
    squares.index_add_(0, index_tensor(tuple(owners), squares.device), _squared(norms))
    largest, nonzero = torch.from_numpy(np.array(rest, np.float64)).t()
    return torch.stack([squares, torch.stack(sums).double(), largest, nonzero])


def _norms_of_blocks(flat: Tensor) -> list[Tensor]:
    """Norms of a flat tensor's blocks, and of what is left."""
    whole = flat.numel() - flat.numel() % BLOCK
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=-1)] if whole else []
    if whole < flat.numel() or not whole:
        norms.append(torch.linalg.vector_norm(flat[whole:]).view(1))
    return norms


def _squared(norms: list[Tensor]) -> Tensor:
    return torch.cat(norms).double().square_()


def square_sum(flat: Tensor) -> Tensor:
    """Of one flat piece, blocks added in float64: a float64 scalar tensor."""
    return _squared(_norms_of_blocks(flat)).sum()


def _on_gpu(pieces: list[Tensor]) -> Tensor:
    """[4, pieces], a few kernels over all pieces; torch's GPU norms add as a tree."""
    accumulator = _accumulator(pieces[0])
    by_order = [torch._foreach_norm(pieces, order, accumulator) for order in (2, 1, float("inf"))]
    rows = [torch.stack(list(norms)).double() for norms in by_order]
    nonzero = [torch.linalg.vector_norm(p, 0, dtype=accumulator) for p in pieces]
    return torch.stack([rows[0].square(), rows[1], rows[2], torch.stack(nonzero).double()])


def careful_statistics(tensors: Sequence[Tensor]) -> Tensor:
    """As `statistics`, over the finite elements, in float64; and the count of the others.

    Returns:
        float64 tensor [5, len(tensors)] on their device.
    """
    if not tensors:
        return torch.zeros(5, 0, dtype=torch.float64)
    return torch.stack([_careful(tensor) for tensor in tensors], dim=1)


def _careful(tensor: Tensor) -> Tensor:
    rows = []
    for piece in pieces_of(tensor):
        bad = ~piece.isfinite()
        finite = piece.double().abs_().masked_fill_(bad, 0.0)
        nonzero = (piece != 0).sum()
        rows.append([finite.square().sum(), finite.sum(), finite.amax(), nonzero, bad.sum()])
    by_piece = torch.stack([torch.stack([v.double() for v in row]) for row in rows])
    total: Tensor = by_piece.sum(0)
    total[2] = by_piece[:, 2].amax()
    return total


def _accumulator(tensor: Tensor) -> torch.dtype:
    """What a tensor's elements are added in before float64 takes over."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

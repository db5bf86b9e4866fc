"""Sums over local shards that are exact enough to compare engines by.

torch's fp32 norm on CPU adds naively: its relative error is 4e-3 at 50 million elements. Here rows
of `BLOCK` elements are reduced by torch's kernels and added in float64: the same speed on large
tensors, an error near 1e-8. torch's `sum` adds pairwise and needs no such help.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BLOCK", "count_nonfinite", "element_sums", "finite_square_sum", "square_sums"]

BLOCK = 4096
"""Elements that are added in the tensor's own precision before float64 takes over."""

_CHUNK = 1 << 22
"""Elements of a temporary where one is needed; parameters can be far larger."""


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
            owner = torch.tensor(owners, device=sums.device)
            counts = torch.tensor([len(part) for part in norms], device=sums.device)
            squares = torch.cat(norms).double().square()
            sums.index_add_(0, owner.repeat_interleave(counts), squares)
    return sums


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


def count_nonfinite(tensor: Tensor) -> Tensor:
    """Number of NaN and Inf elements as a float64 scalar tensor; a block's temporary at a time."""
    chunks = tensor.reshape(-1).split(_CHUNK)
    return torch.stack([(~c.isfinite()).sum() for c in chunks]).sum().double()


def finite_square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares of the finite elements as a float64 scalar tensor, in bounded memory."""
    chunks = tensor.reshape(-1).split(_CHUNK)
    squares = [c.double().nan_to_num(0.0, posinf=0.0, neginf=0.0).square().sum() for c in chunks]
    return torch.stack(squares).sum()


def _accumulator(tensor: Tensor) -> torch.dtype:
    """Half-precision types are summed in float32: fp16 overflows at 65,504, bf16 has 8 bits."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

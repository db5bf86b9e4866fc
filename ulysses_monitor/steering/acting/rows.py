"""Sums over rows of parameters whose flat shards may cut through rows.

A row is what belongs to one index of the first dimension. Legend: R rows, L elements of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["expand_rows", "sum_rows"]


def sum_rows(values: Tensor, offset: int, length: int) -> tuple[int, Tensor]:
    """Returns the sums of the rows that a shard touches.

    Args:
        values: the shard, of any shape.
        offset: where the shard starts in the flattened parameter.
        length: L.

    Returns:
        The index of the first row, and float64 sums of that row and the following ones.
    """
    front, back = _missing(offset, values.numel(), length)
    # [n] -> [rows, L]
    rows = F.pad(values.flatten(), (front, back)).view(-1, length)
    return offset // length, rows.sum(dim=1, dtype=torch.float64)


def expand_rows(row_values: Tensor, offset: int, count: int, length: int) -> Tensor:
    """Returns for each element of a shard the value of its row.

    Args:
        row_values: [R], a value for each row of the full parameter.
        offset: where the shard starts in the flattened parameter.
        count: elements of the shard.
        length: L.

    Returns:
        [count], of the type of `row_values`.
    """
    front, back = _missing(offset, count, length)
    first, last = offset // length, (offset + count + back) // length
    # [rows] -> [rows * L] -> [count]
    wide = row_values[first:last].repeat_interleave(length)
    return wide[front : front + count]


def _missing(offset: int, count: int, length: int) -> tuple[int, int]:
    """Returns how many elements of its first and last row the shard lacks."""
    return offset % length, -(offset + count) % length

"""Sums over rows of parameters of which each rank holds a flat piece that may cut rows.

A row is what belongs to one index of the first dimension. Legend: R rows, L elements of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["row_sums", "spread"]


def row_sums(values: Tensor, offset: int, length: int) -> tuple[int, Tensor]:
    """Sums of the rows that a piece touches.

    Args:
        values: the piece, of any shape.
        offset: where it begins in the flattened parameter.
        length: L.

    Returns:
        The first row, and float64 sums of it and those after it.
    """
    front, back = _missing(offset, values.numel(), length)
    # [n] -> [rows, L]
    rows = F.pad(values.flatten(), (front, back)).view(-1, length)
    return offset // length, rows.sum(dim=1, dtype=torch.float64)


def spread(of_rows: Tensor, offset: int, count: int, length: int) -> Tensor:
    """For each element of a piece, its row's number.

    Args:
        of_rows: [R], a number for each row of the whole parameter.
        offset: where the piece begins.
        count: its elements.
        length: L.

    Returns:
        [count], of the type of `of_rows`.
    """
    front, back = _missing(offset, count, length)
    first, last = offset // length, (offset + count + back) // length
    # [rows] -> [rows * L] -> [count]
    wide = of_rows[first:last].repeat_interleave(length)
    return wide[front : front + count]


def _missing(offset: int, count: int, length: int) -> tuple[int, int]:
    """Elements of the first and of the last row that the piece lacks."""
    return offset % length, -(offset + count) % length

"""Moments of a tensor's elements, as sums that add up over micro-batches and ranks.

Legend: R the sums: elements, powers 1 to 4, exact zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.probes.sums import GPU_PIECE, PIECE, split_pieces

__all__ = ["STATISTICS", "SUMS", "measure", "statistics_of", "unscale"]

Array = npt.NDArray[np.float64]

SUMS = 6
"""Length of the sums that `measure` returns."""

STATISTICS = ("rms", "zero_frac", "kurtosis")
"""What `statistics_of` returns."""


def measure(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums [R], float64, and the largest magnitude, both on the tensor's device."""
    sums = torch.zeros(SUMS, dtype=torch.float64, device=tensor.device)
    largest = torch.zeros((), dtype=torch.float64, device=tensor.device)
    size = PIECE if tensor.device.type == "cpu" else GPU_PIECE
    for part in split_pieces(tensor.detach(), size) if tensor.numel() else ():
        x = part if part.dtype == torch.float64 else part.float()
        squares = x * x
        powers = (x, squares, squares * x, squares * squares)
        found = [power.sum(dtype=torch.float64) for power in powers]
        zeros = (x == 0).sum()
        sums += torch.stack([torch.full_like(found[0], x.numel()), *found, zeros.double()])
        largest = torch.maximum(largest, x.abs().amax().double())
    return sums, largest


def unscale(sums: Tensor, scale: Tensor | float) -> Tensor:
    """Returns the sums [..., R] of elements that were `scale` times too large."""
    factor = torch.as_tensor(scale, dtype=torch.float64, device=sums.device)
    powers = torch.tensor([0, 1, 2, 3, 4, 0], dtype=torch.float64, device=sums.device)
    return sums / factor**powers


def statistics_of(sums: Array) -> Array:
    """Returns root mean square, share of zeros and kurtosis [..., 3] of sums [..., R].

    Kurtosis is E[(x - m)^4] / E[(x - m)^2]^2, which is 3 for a normal distribution. NaN without
    elements.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n, zeros = sums[..., 0], sums[..., 5]
        one, two, three, four = (sums[..., i] / n for i in range(1, 5))
        variance = two - one**2
        fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
        kurtosis = np.where(variance > 1e-12 * two, fourth / variance**2, np.nan)
        return np.stack([np.sqrt(two), zeros / n, kurtosis], axis=-1)

"""Gaussian noise that depends on an element's position, not on the rank that holds it.

A sequential generator gives each rank different numbers, so replicas drift apart and the result
depends on the number of ranks. Here each element's number is a function of (seed, step, parameter,
position in the parameter) alone.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

__all__ = ["gaussian", "noise_key"]

_CHUNK = 1 << 20
"""Elements at a time: the temporaries of one chunk take 40 MB at most."""

_GOLDEN, _FIRST, _SECOND = (
    value - (1 << 64) if value >> 63 else value
    for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_BITS = 24


def noise_key(seed: int, step: int, name: str) -> int:
    """Returns the key of one parameter's noise in one step.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        name: the parameter's full name.

    Returns:
        A signed 64-bit number.
    """
    key = torch.tensor(zlib.crc32(name.encode()))
    for number in (step, seed):
        key = _mix(key ^ _mix(torch.tensor(number)))
    return int(key)


def gaussian(key: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Returns standard normal numbers for the elements [offset, offset + count) of a parameter.

    Uniform numbers by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) as a counter-based generator, made normal by the Box-Muller transform.

    Returns:
        float32 [count].
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        positions = torch.arange(offset + first, offset + first + size, device=device)
        bits = _mix(key + (positions + 1) * _GOLDEN)
        # Two uniform numbers of 24 bits, in (0, 1] and [0, 1).
        one = (_shift_right(bits, 40) + 1).to(torch.float32) * 2.0**-_BITS
        other = (_shift_right(bits, 16) & ((1 << _BITS) - 1)).to(torch.float32) * 2.0**-_BITS
        radius = one.log_().mul_(-2.0).sqrt_()
        out[first : first + size] = radius.mul_(other.mul_(2 * math.pi).cos_())
    return out


def _mix(bits: Tensor) -> Tensor:
    """Applies SplitMix64's finalizer; int64 multiplication wraps around, as it must."""
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Shifts right without copying the sign bit."""
    return (bits >> by) & ((1 << (64 - by)) - 1)

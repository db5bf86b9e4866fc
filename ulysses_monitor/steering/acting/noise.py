"""Gaussian noise that depends on where an element lies, not on who holds it.

A generator that is asked for numbers one after the other gives each rank others, so replicas drift
apart, and another number of ranks trains another way. Here each element's number is a function of
(seed, step, parameter, place in the parameter) alone.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

__all__ = ["gaussian", "key_of"]

_PIECE = 1 << 20
"""Elements at a time: the temporaries of one piece are 40 MB at most."""

_GOLDEN, _FIRST, _SECOND = (
    value - (1 << 64) if value >> 63 else value
    for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_BITS = 24


def key_of(seed: int, step: int, name: str) -> int:
    """The key of one parameter's noise in one step.

    Args:
        seed: the run's.
        step: the optimizer step.
        name: the parameter's full name.

    Returns:
        A signed 64-bit number.
    """
    key = torch.tensor(zlib.crc32(name.encode()))
    for number in (step, seed):
        key = _mixed(key ^ _mixed(torch.tensor(number)))
    return int(key)


def gaussian(key: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Independent standard normal numbers of the elements [offset, offset + count) of a parameter.

    Uniform numbers by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) as a counter-based generator, made normal by Box and Muller's method.

    Returns:
        float32 [count].
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        places = torch.arange(offset + first, offset + first + size, device=device)
        bits = _mixed(key + (places + 1) * _GOLDEN)
        # Two uniform numbers of 24 bits, in (0, 1] and [0, 1).
        one = (_shifted(bits, 40) + 1).to(torch.float32) * 2.0**-_BITS
        other = (_shifted(bits, 16) & ((1 << _BITS) - 1)).to(torch.float32) * 2.0**-_BITS
        radius = one.log_().mul_(-2.0).sqrt_()
        out[first : first + size] = radius.mul_(other.mul_(2 * math.pi).cos_())
    return out


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer; int64 multiplication wraps around as it is meant to."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifts right without the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)

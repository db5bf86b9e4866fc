"""CPU reductions that read memory once, compiled by Numba, on as many threads as torch uses.

torch has no operation that returns a norm, a sum of magnitudes, a maximum and a count of non-zeros
in one pass, and its fp32 norm adds naively, with a relative error of 4e-3 at 50 million elements.
These kernels add in float64, which costs nothing because memory is the bottleneck. Only
`ulysses_monitor.probes.compiled` imports this module, because Numba may not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from ulysses_monitor.probes.adam_step import AdamStep

__all__ = ["adam_changes", "statistics"]

_T = TypeVar("_T")

_PIECE = 1 << 19
"""Most elements that one call reads; also the size of a float32 copy of half-precision data."""

_SERIAL_LIMIT = 1 << 18
"""Elements up to which a second thread takes longer to start than it saves."""

_MAGNITUDE_MASK = {kind: kind(np.iinfo(kind).max) for kind in (np.int32, np.int64)}
"""Masks with every bit of a number except its sign."""

# No "nnan" and "ninf": NaN and Inf must survive, because they trigger the second reading.
_compiled = njit(
    fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True, cache=True
)


def statistics(tensors: Sequence[Tensor]) -> Tensor:
    """Returns sum of squares, sum of magnitudes, largest magnitude and non-zeros of each tensor.

    Args:
        tensors: dense CPU tensors of any shape and floating type.

    Returns:
        float64 tensor [4, len(tensors)]; a column is not finite if its tensor is not.
    """
    if not tensors:
        return torch.zeros(4, 0, dtype=torch.float64)
    pieces = [[(piece,) for piece in _pieces(tensor)] for tensor in tensors]
    # [pieces, 4] -> [4, pieces]
    found = np.array(_map_on_threads(_statistics, [p for group in pieces for p in group])).T
    starts = _starts(pieces)
    result = np.add.reduceat(found, starts, axis=1)
    result[2] = np.maximum.reduceat(found[2], starts)
    return torch.from_numpy(result)


def adam_changes(steps: Sequence[tuple[AdamStep, Sequence[Tensor]]]) -> Tensor:
    """Returns the squared norms of each step's change and of the parameter before it.

    Args:
        steps: for each parameter, the scalars of its Adam step, and three CPU tensors of one
            shape: the parameter after the step, ``exp_avg`` and ``exp_avg_sq``.

    Returns:
        float64 tensor [2, len(steps)].
    """
    if not steps:
        return torch.zeros(2, 0, dtype=torch.float64)
    pieces = [
        [
            (AdamStep(*map(float, step)), *parts)
            for parts in zip(*map(_pieces, tensors), strict=True)
        ]
        for step, tensors in steps
    ]
    # [pieces, 2] -> [2, pieces]
    found = np.array(_map_on_threads(_adam_change, [p for group in pieces for p in group])).T
    return torch.from_numpy(np.add.reduceat(found, _starts(pieces), axis=1))


def _starts(groups: Sequence[Sequence[Any]]) -> npt.NDArray[np.intp]:
    """Returns where each group begins in the concatenation of all."""
    return np.cumsum([0, *(len(group) for group in groups[:-1])])


def _statistics(job: tuple[Tensor]) -> tuple[float, float, float, int]:
    array = _array(job[0])
    integer = np.int32 if array.itemsize == 4 else np.int64
    bits = array.view(integer)
    squares, magnitudes, highest, nonzero = _statistics_of(array, bits, _MAGNITUDE_MASK[integer])
    return squares, magnitudes, float(np.array(highest, integer).view(array.dtype)), nonzero


@_compiled
def _statistics_of(array: Any, bits: Any, magnitude_mask: Any) -> Any:  # pragma: no cover
    """Reduces one array; `bits` is the array as integers.

    Magnitudes of floats have the order of their bits, which a processor compares faster. A piece is
    short enough for an int32 counter; Numba would widen it to int64 by itself.
    """
    kind = bits.dtype.type
    squares, magnitudes, highest, nonzero = 0.0, 0.0, kind(0), np.int32(0)
    for i in range(array.size):
        value = np.float64(abs(array[i]))
        squares += value * value
        magnitudes += value
        magnitude_bits = kind(bits[i] & magnitude_mask)
        highest = max(highest, magnitude_bits)
        nonzero = np.int32(nonzero + (magnitude_bits != 0))
    return squares, magnitudes, highest, nonzero


def _adam_change(job: tuple[AdamStep, Tensor, Tensor, Tensor]) -> tuple[float, float]:
    step, *parts = job
    after, m, v = map(_array, parts)
    scalars = map(after.dtype.type, (*step, 1 / (1 + step.decay)))
    changes: tuple[float, float] = _adam_change_of(after, m, v, *scalars)
    return changes


@_compiled
def _adam_change_of(  # pragma: no cover
    after: Any, m: Any, v: Any, rate: Any, root_scale: Any, eps: Any, decay: Any, undo: Any
) -> Any:
    """Reduces one parameter after Adam's step and its moments `m` and `v`."""
    changes, befores = 0.0, 0.0
    for i in range(after.size):
        update = m[i] / (np.sqrt(v[i]) * root_scale + eps) * rate
        before = (after[i] + update) * undo
        change = np.float64(update - decay * before)
        changes += change * change
        befores += np.float64(before) * np.float64(before)
    return changes, befores


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    return iter((flat,) if flat.numel() <= _PIECE else flat.split(_PIECE))


def _array(piece: Tensor) -> npt.NDArray[Any]:
    """Returns the piece's elements; half precision becomes float32, which represents it exactly."""
    wide = piece if piece.dtype in (torch.float32, torch.float64) else piece.float()
    return wide.numpy()


def _map_on_threads(call: Callable[[Any], _T], jobs: Sequence[tuple[Any, ...]]) -> list[_T]:
    """Calls a function that releases the GIL on every job; a job ends with a tensor."""
    threads = torch.get_num_threads()
    sizes = np.array([job[-1].numel() for job in jobs])
    if threads == 1 or sizes.sum() <= _SERIAL_LIMIT:
        return [call(job) for job in jobs]
    # One run of neighbouring jobs per thread, each with about as many elements.
    ends = np.searchsorted(sizes.cumsum(), sizes.sum() * np.arange(1, threads) / threads)
    runs = [jobs[low:high] for low, high in zip([0, *ends], [*ends, len(jobs)], strict=True)]
    found = _pool(threads).map(lambda run: [call(job) for job in run], runs)
    return [result for run in found for result in run]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "ulysses-kernels")

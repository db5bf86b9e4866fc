"""The probes of every run: gradients with LoRA ratios, optimizer state, parameters.

Legend: P trainable parameters, H parameters of which this rank counts a shard, N adapter pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.engines import Shard
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.probes.layout import Layout, median, metric_names
from ulysses_monitor.probes.sums import (
    finite_statistics,
    index_tensor,
    statistics,
)
from ulysses_monitor.records import Cost

__all__ = ["AdamStateProbe", "GradientProbe", "ParameterProbe", "count_elements", "scatter_rows"]

Array = npt.NDArray[np.float64]

_SQUARES, _ABS, _NONZERO, _BAD = range(4)
"""Rows of what `GradientProbe` reads; the maxima follow them."""


class GradientProbe:
    """``grad/*`` and ``lora/grad_ratio_B_A/*``.

    Elements that are NaN or Inf are counted under ``grad/nonfinite`` and left out of the other
    metrics, so that one bad tensor does not hide the rest. A parameter without a gradient counts
    as zeros.

    Args:
        layout: the parameters.
    """

    name = "gradients"
    cost: Cost = "every"
    maxima = 1
    rechecks = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.size = 4 * len(layout.names)
        pairs = layout.adapter_pairs
        self._pair_a = np.array([pair.a for pair in pairs], np.intp)
        self._pair_b = np.array([pair.b for pair in pairs], np.intp)
        kinds = ("norm", "abs_mean", "zero_frac", "nonfinite", "max")
        self.names = tuple(n for kind in kinds for n in metric_names(f"grad/{kind}", layout))
        self.names += ("grad/abs_mean/tensor_mean",)
        if pairs:
            modules = (f"lora/grad_ratio_B_A/module/{pair.module}" for pair in pairs)
            self.names += (*modules, "lora/grad_ratio_B_A/total")

    def read(self, reading: Reading) -> Tensor:
        """Returns sums of squares, magnitudes, non-zeros and non-finites, then maxima [5 * P]."""
        held = [(s.index, s.grad) for s in reading.shards if s.grad is not None]
        grads = [grad for _, grad in held]
        found = (finite_statistics if reading.is_recheck else statistics)(grads)
        squares, magnitudes, largest, nonzero = found[:4]
        bad = found[4] if reading.is_recheck else torch.zeros_like(squares)
        scale = reading.grad_scale
        rows = [squares / scale**2, magnitudes / scale, nonzero, bad, largest / scale]
        return scatter_rows(torch.stack(rows), [i for i, _ in held], self.layout)

    def values(self, totals: Array) -> Array:
        """See `Probe.values`."""
        rows = totals.reshape(5, -1)  # [5 * P] -> [5, P]
        largest = rows[4]
        sums = [self.layout.aggregate(row) for row in rows[:4]]
        numels = self.layout.aggregate(np.array(self.layout.numels, np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums[_ABS] / (numels - sums[_BAD])
            tensor_mean = (rows[_ABS] / (self.layout.numels - rows[_BAD])).mean()
        values = [
            np.sqrt(sums[_SQUARES]),
            means,
            1.0 - sums[_NONZERO] / numels,
            sums[_BAD],
            self.layout.aggregate_max(largest),
            np.array([tensor_mean]),
        ]
        if len(self._pair_a):
            values.append(self._ratios(np.sqrt(rows[_SQUARES])))
        return np.concatenate(values)

    def _ratios(self, norms: Array) -> Array:
        """Returns norm of B's gradient over A's for each pair, then their median [N + 1].

        Inf while B = 0 keeps A's gradient at zero; NaN if neither A nor B got a gradient.
        """
        a, b = norms[self._pair_a], norms[self._pair_b]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = b / a
        return np.append(ratios, median(ratios))


class AdamStateProbe:
    """``optim/exp_avg_norm/*`` and ``optim/exp_avg_sq_mean/*``: the state that enters this step.

    A moment that cannot be read as it is (SGD has none; Adafactor factors the second, GaLore and
    APOLLO project both, 8-bit optimizers quantize them) gives no metric, and neither does the first
    step, before which there is no state. A layer and the total need the moment of every part: the
    sum of the rest would look like a smaller moment. A parameter that never got a gradient counts
    as zeros, whether the optimizer keeps state for it or not.

    Args:
        layout: the parameters.
    """

    name = "optimizer_state"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.size = 5 * len(layout.names)
        self.names = (
            *metric_names("optim/exp_avg_norm", layout),
            *metric_names("optim/exp_avg_sq_mean", layout),
        )

    def read(self, reading: Reading) -> Tensor:
        """Returns the first moment's sums of squares, the second's sums, and elements [5 * P].

        The elements are counted by what they have: a first moment, a second moment, no state.
        """
        first = [s for s in reading.shards if "exp_avg" in s.state]
        second = [s for s in reading.shards if "exp_avg_sq" in s.state]
        # A parameter without state counts as zeros, but only if others have state.
        bare = [s for s in reading.shards if s.settings and not (s.state or s.has_state)]
        rows = [
            self._row(statistics([s.state["exp_avg"] for s in first])[0], first),
            # The second moment is never negative, so its sum is its sum of magnitudes.
            self._row(statistics([s.state["exp_avg_sq"] for s in second])[1], second),
        ]
        rows += [count_elements(shards, self.layout) for shards in (first, second, bare)]
        device = next((s.param.device for s in reading.shards), None)
        return torch.cat([row.to(device, non_blocking=True) for row in rows])

    def _row(self, values: Tensor, shards: Sequence[Shard]) -> Tensor:
        return scatter_rows(values[None], [s.index for s in shards], self.layout)

    def values(self, totals: Array) -> Array | None:
        """See `Probe.values`."""
        squares, sums, first, second, bare = totals.reshape(5, -1)  # [5 * P] -> [5, P]
        aggregate = self.layout.aggregate
        if not squares.any() and not sums.any():
            return None
        numels = aggregate(np.array(self.layout.numels, np.float64))
        # A parameter that never got a gradient counts as zeros in a moment that others have.
        firsts, seconds = (aggregate(has + bare if has.any() else has) for has in (first, second))
        with np.errstate(divide="ignore", invalid="ignore"):
            norms = np.where(firsts == numels, np.sqrt(aggregate(squares)), np.nan)
            means = np.where(seconds == numels, aggregate(sums) / seconds, np.nan)
            return np.concatenate([norms, means])


class ParameterProbe:
    """``param/norm/*``: the parameters that enter this step, in the optimizer's precision.

    Args:
        layout: the parameters.
    """

    name = "parameters"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.size = len(layout.names)
        self.names = metric_names("param/norm", layout)

    def read(self, reading: Reading) -> Tensor:
        """Returns sums of squares [P]."""
        squares = statistics([s.param for s in reading.shards])[0]
        return scatter_rows(squares[None], [s.index for s in reading.shards], self.layout)

    def values(self, totals: Array) -> Array:
        """See `Probe.values`."""
        return np.sqrt(self.layout.aggregate(totals))


def scatter_rows(rows: Tensor, indices: Sequence[int], layout: Layout) -> Tensor:
    """Scatters values of shards into rows over all parameters; zeros elsewhere.

    Args:
        rows: values of the shards [R, H].
        indices: the parameter of each shard [H], none twice.
        layout: the parameters.

    Returns:
        float64 tensor [R * P].
    """
    placed = torch.zeros(len(rows), len(layout.names), dtype=torch.float64, device=rows.device)
    if len(indices):
        placed.index_copy_(1, index_tensor(tuple(indices), rows.device), rows.double())
    return placed.flatten()  # [R, P] -> [R * P]


def count_elements(shards: Sequence[Shard], layout: Layout) -> Tensor:
    """Returns how many elements of each parameter the shards hold [P], on their device."""
    counts = np.zeros(len(layout.names))
    for s in shards:
        counts[s.index] += s.param.numel()
    device = shards[0].param.device if shards else None
    return torch.from_numpy(counts).to(device, non_blocking=True)

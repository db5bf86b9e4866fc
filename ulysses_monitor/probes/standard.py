"""The probes every run has: gradients with LoRA ratios, optimizer state, parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.engines import Shard
from ulysses_monitor.probes.layout import Layout
from ulysses_monitor.probes.sums import (
    count_nonfinite,
    element_sums,
    finite_square_sum,
    square_sums,
)
from ulysses_monitor.records import Cost

__all__ = ["AdamStateProbe", "GradientProbe", "ParameterProbe"]

Array = npt.NDArray[np.float64]


class GradientProbe:
    """``grad/norm/*``, ``grad/nonfinite/*`` and ``lora/grad_ratio_B_A/*``.

    Elements that are NaN or Inf are counted under ``grad/nonfinite`` and left out of the norms, so
    that one bad tensor does not hide the others.
    """

    name = "gradients"
    cost: Cost = "every"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.size = 2 * len(layout.names)
        pairs = layout.adapter_pairs
        self._pair_a = np.array([pair.a for pair in pairs], np.intp)
        self._pair_b = np.array([pair.b for pair in pairs], np.intp)
        self.names = (*_named("grad/norm", layout), *_named("grad/nonfinite", layout))
        if pairs:
            modules = (f"lora/grad_ratio_B_A/module/{pair.module}" for pair in pairs)
            self.names += (*modules, "lora/grad_ratio_B_A/total")

    def sums(self, shards: Sequence[Shard], grad_scale: float) -> Tensor:
        """Sums of squares [P], then counts of non-finite elements [P]."""
        held = [(s.index, s.grad) for s in shards if s.grad is not None]
        grads = [grad for _, grad in held]
        squares, bad = square_sums(grads), torch.zeros(len(grads), dtype=torch.float64)
        bad = bad.to(squares.device)
        # An overflowing square is as suspect as a NaN: look closer, but only then.
        for i in (~squares.isfinite()).nonzero().flatten().tolist():
            bad[i] = count_nonfinite(grads[i])
            squares[i] = finite_square_sum(grads[i])
        total = torch.zeros(2, len(self.layout.names), dtype=torch.float64, device=squares.device)
        index = torch.tensor([i for i, _ in held], dtype=torch.long, device=squares.device)
        total[0].index_add_(0, index, squares / grad_scale**2)
        total[1].index_add_(0, index, bad)
        return total.flatten()

    def values(self, totals: Array) -> Array:
        """See `Probe.values`."""
        squares, bad = totals.reshape(2, -1)
        values = [np.sqrt(self.layout.spread(squares)), self.layout.spread(bad)]
        if len(self._pair_a):
            values.append(self._ratios(np.sqrt(squares)))
        return np.concatenate(values)

    def _ratios(self, norms: Array) -> Array:
        """Norm of B's gradient over A's per pair, and the median over pairs [pairs + 1].

        Inf while B = 0 keeps A's gradient at zero; NaN where neither side got a gradient.
        """
        a, b = norms[self._pair_a], norms[self._pair_b]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = b / a
        known = ratios[~np.isnan(ratios)]
        return np.append(ratios, np.median(known) if len(known) else np.nan)


class AdamStateProbe:
    """``optim/exp_avg_norm/*`` and ``optim/exp_avg_sq_mean/*``: the state that enters this step.

    An optimizer that keeps neither (SGD, Adafactor) gives no metric; neither does the first step,
    before which there is no state.
    """

    name = "optimizer_state"
    cost: Cost = "sampled"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.size = 3 * len(layout.names)
        self.names = (
            *_named("optim/exp_avg_norm", layout),
            *_named("optim/exp_avg_sq_mean", layout),
        )

    def sums(self, shards: Sequence[Shard], grad_scale: float) -> Tensor:  # noqa: ARG002
        """Squares of the first moment [P], sums of the second [P], elements that have state [P]."""
        held = [s for s in shards if {"exp_avg", "exp_avg_sq"} <= s.state.keys()]
        squares = square_sums([s.state["exp_avg"] for s in held])
        device = squares.device
        total = torch.zeros(3, len(self.layout.names), dtype=torch.float64, device=device)
        if held:
            index = torch.tensor([s.index for s in held], device=device)
            means = element_sums([s.state["exp_avg_sq"] for s in held])
            numels = torch.tensor([float(s.param.numel()) for s in held], dtype=torch.float64)
            total[0].index_add_(0, index, squares)
            total[1].index_add_(0, index, means)
            total[2].index_add_(0, index, numels.to(device))
        return total.flatten()

    def values(self, totals: Array) -> Array | None:
        """See `Probe.values`."""
        squares, sums, numels = (self.layout.spread(row) for row in totals.reshape(3, -1))
        if not numels[0]:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.concatenate([np.sqrt(squares), sums / numels])


class ParameterProbe:
    """``param/norm/*``: the parameters that enter this step, in the optimizer's precision."""

    name = "parameters"
    cost: Cost = "sampled"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.size = len(layout.names)
        self.names = _named("param/norm", layout)

    def sums(self, shards: Sequence[Shard], grad_scale: float) -> Tensor:  # noqa: ARG002
        """Sums of squares [P]."""
        squares = square_sums([s.param for s in shards])
        total = torch.zeros(self.size, dtype=torch.float64, device=squares.device)
        index = torch.tensor([s.index for s in shards], dtype=torch.long, device=squares.device)
        return total.index_add_(0, index, squares)

    def values(self, totals: Array) -> Array:
        """See `Probe.values`."""
        return np.sqrt(self.layout.spread(totals))


def _named(prefix: str, layout: Layout) -> tuple[str, ...]:
    return tuple(f"{prefix}/{scope}" for scope in layout.scopes)

"""The gradient noise scale: how much larger a batch could be before it stops paying.

McCandlish et al., An Empirical Model of Large-Batch Training, arXiv 1812.06162: B_simple =
tr(S) / |G|^2, from the norms of gradients of two batch sizes (their appendix A.1). The small batch
is what was accumulated when the next micro-batch was observed; the large one is the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.sums import statistics

__all__ = ["NoiseScale"]

_SQUARES, _FOURTH, _SMALL, _ALL, _MEASURED = _SUMS = tuple(
    f"noise {name}" for name in ("squares", "fourth", "small", "all", "measured")
)

_KEEP = 0.9
"""Weight that the averages of tr(S) and |G|^2 keep at each measurement."""

_LEAST = 5
"""Measurements before their ratio, which is biased for few, is recorded."""


class NoiseScale:
    """Measures the gradient of a part of a step's micro-batches, on every rank.

    Args:
        engine: what is trained.

    Attributes:
        SUMS: names of what `take_sums` returns.
    """

    SUMS = _SUMS

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._trace = self._signal = 0.0
        self._count = 0
        self._start_step()

    def _start_step(self) -> None:
        self._squares: Tensor | None = None
        self._passes = 0
        self._losses = 0

    def see_loss(self, passes: int, *, is_sampled: bool) -> None:
        """Looks at the gradients where a further micro-batch is observed.

        Args:
            passes: backward passes since the last step.
            is_sampled: whether the step is one to measure.
        """
        self._losses += 1
        if is_sampled and passes >= 1 and self._squares is None:
            grads = [p.grad for p in self._engine.model.parameters() if p.grad is not None]
            with torch.no_grad():
                scale = self._engine.grad_scale()
                self._squares = (statistics(grads)[0] / scale**2).sum()
            self._passes = passes

    def take_sums(self, passes: int) -> dict[str, Tensor | float]:
        """Returns this rank's sums, the same names on all ranks.

        Args:
            passes: backward passes of the step; a step in which another number of losses was
                observed is left out.
        """
        sums: dict[str, Tensor | float] = dict.fromkeys(_SUMS, 0.0)
        if self._squares is not None and self._passes < passes == self._losses:
            squares = self._squares * (passes / self._passes) ** 2
            sums = {
                _SQUARES: squares,
                _FOURTH: squares**2,
                _SMALL: float(self._passes),
                _ALL: float(passes),
                _MEASURED: 1.0,
            }
        self._start_step()
        return sums

    def metrics(self, sums: Mapping[str, float], norm: float, tokens: float) -> dict[str, float]:
        """Returns the metrics of a step.

        Args:
            sums: of all ranks.
            norm: the norm of the step's gradient.
            tokens: that the step's loss is a mean over, on all ranks.
        """
        ranks = world_size()
        if sums[_MEASURED] != ranks or not tokens > 0 or not math.isfinite(norm):
            return {}
        small = sums[_SQUARES] / ranks
        # Where ranks have the same norm, DDP has averaged the part over them already.
        is_reduced = sums[_FOURTH] / ranks - small**2 <= 1e-12 * small**2
        share = sums[_SMALL] / ranks / sums[_ALL] * (ranks if is_reduced else 1)
        if not 0 < share < 1 or not math.isfinite(small):
            return {}
        # For a share f of a batch of B: |G|^2 = (|G_B|^2 - f |G_fB|^2) / (1 - f),
        # tr(S) = (|G_fB|^2 - |G_B|^2) f B / (1 - f).
        signal = (norm**2 - share * small) / (1 - share)
        trace = (small - norm**2) * share * tokens / (1 - share)
        found = {"grad/signal/total": signal, "grad/noise/total": trace}
        scale = self._average(signal, trace)
        return found if math.isnan(scale) else {**found, "grad/noise_scale/total": scale}

    def _average(self, signal: float, trace: float) -> float:
        """Returns the ratio of the averages; NaN where it is not known."""
        self._count += 1
        self._signal = _KEEP * self._signal + (1 - _KEEP) * signal
        self._trace = _KEEP * self._trace + (1 - _KEEP) * trace
        is_known = self._count >= _LEAST and self._signal > 0 and self._trace > 0
        return self._trace / self._signal if is_known else math.nan

"""The module probe: what the blocks of a model give and get, at sampled steps.

Legend: M watched modules, N experts of a block, R sums of `moments`, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import undo_all
from ulysses_monitor.common.ranks import rank, world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.probes.modules.moments import STATISTICS, SUMS, statistics_of, unscale
from ulysses_monitor.probes.modules.watched import find_watched
from ulysses_monitor.records import Cost

__all__ = ["ModuleProbe", "Options", "Surroundings"]

Array = npt.NDArray[np.float64]

_LARGEST = 3
"""Maxima of a module: activation, output gradient, attention logit."""

_SHOWS_LOGITS = ("eager", "sdpa")
"""Attention implementations of transformers whose logits can be computed."""


@dataclass(frozen=True)
class Options:
    """See `ModuleProbes`."""

    modules: tuple[str, ...] = ()
    attention: bool = True
    gradients: bool = True


@dataclass(frozen=True)
class Surroundings:
    """What a probe on request gets of the training.

    Attributes:
        engine: what is trained.
        next_step: returns the number of the coming step.
        is_sampled: tells whether a step is a sampled one.
        guard: keeps a failure out of forward and backward passes.
        report: records an event: its kind, and what happened.
    """

    engine: Engine
    next_step: Callable[[], int]
    is_sampled: Callable[[int], bool]
    guard: Guard
    report: Callable[[str, Mapping[str, Any]], None]


class ModuleProbe:
    """``activation/*``, ``output_grad/*``, ``attention/logit_max/*`` and ``moe/expert_load_*``.

    Hooks look at each forward pass of a training step that has gradients, once for each micro-batch
    also where checkpointing computes a block twice. Inside of `torch.compile` they do nothing, so
    that it need not break its graph; then there are no such metrics, and an event says so.

    Args:
        around: what surrounds the probe.
        options: what is read.
    """

    name = "modules"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, around: Surroundings, options: Options) -> None:
        self._around = around
        engine = around.engine
        self._why_no_logits = _why_no_logits(engine, options.attention)
        self._gradients = options.gradients
        self._watched = find_watched(
            engine.model,
            options.modules,
            self._coming,
            around.guard,
            sees_gradients=options.gradients,
            sees_attention=not self._why_no_logits,
            grad_scale=engine.grad_scale,
        )
        self._experts = [w.experts for w in self._watched]
        self._parts = 2 * SUMS * len(self._watched) + sum(self._experts)
        self._row = _LARGEST * len(self._watched)
        self.size = self._parts + world_size() * self._row
        self.names = tuple(self._make_names())
        self._told: set[str] = set()
        self._is_closed = False

    def close(self) -> None:
        """Removes every hook."""
        self._is_closed = True
        for watched in self._watched:
            undo_all(watched.undos)

    def _coming(self) -> int | None:
        step = self._around.next_step()
        return None if self._is_closed or not self._around.is_sampled(step) else step

    def announce(self) -> None:
        """Says what cannot be read in this training."""
        if self._why_no_logits:
            self._tell("attention/logit_max", self._why_no_logits)
        if not self._watched:
            self._tell("activation", "the model has no blocks, and no module has such a name")

    # -- the vector ------------------------------------------------------------------------------

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002 - the protocol fixes the signature
        """Returns sums, tokens of experts, and maxima in a row of this rank.

        Its length is 2 * M * R + sum(N) + W * 3 * M.
        """
        taken = [w.take() for w in self._watched]
        device = self._around.engine.device
        acts = torch.stack([t.activations.to(device) for t in taken])
        grads = torch.stack([unscale(t.gradients.to(device), t.scale) for t in taken])
        loads = [t.load.to(device) for t in taken]
        largest = torch.stack([t.largest.to(device) for t in taken])
        scales = [torch.as_tensor(t.scale, dtype=torch.float64, device=device) for t in taken]
        largest[:, 1] /= torch.stack([s.reshape(()) for s in scales])
        before, after = rank() * self._row, (world_size() - rank() - 1) * self._row
        zeros = torch.zeros(max(before, after), dtype=torch.float64, device=device)
        parts = [acts.flatten(), grads.flatten(), *loads, zeros[:before], largest.flatten()]
        return torch.cat([*parts, zeros[:after]])

    def values(self, totals: Array) -> Array | None:
        """See `Probe.values`."""
        count = len(self._watched)
        sums = totals[: 2 * SUMS * count].reshape(2, count, SUMS)
        largest = totals[self._parts :].reshape(world_size(), count, _LARGEST).max(axis=0)
        if not sums[0, :, 0].any():
            self._tell(
                "activation",
                "no watched module was called in a training step: the model is compiled with "
                "torch.compile, in which the probe does nothing, or it is called by other ways",
            )
            return None
        acts = self._moments(sums[0], largest[:, 0])
        parts = [acts]
        if self._gradients:
            parts.append(self._moments(sums[1], largest[:, 1]))
        if not self._why_no_logits:
            parts.append(self._logits(largest[:, 2]))
        parts.append(self._loads(totals[2 * SUMS * count : self._parts]))
        return np.concatenate(parts)

    def _moments(self, sums: Array, largest: Array) -> Array:
        """Returns statistics of each module and in total, by statistic [4 * (M + 1)]."""
        each = statistics_of(sums)
        total = statistics_of(sums.sum(axis=0))
        total[2] = _highest(each[:, 2])
        each = np.vstack([each, total])
        seen = np.append(sums[:, 0] > 0, True)
        tops = np.where(seen, np.append(largest, largest.max()), np.nan)
        return np.concatenate([*each.T, tops])

    def _logits(self, largest: Array) -> Array:
        found = np.where(np.isneginf(largest), np.nan, largest)
        if np.isnan(found).all():
            self._tell(
                "attention/logit_max",
                "no block calls torch's scaled_dot_product_attention or a softmax of [B, H, L, S]",
            )
        return np.append(found, _highest(found))

    def _loads(self, counts: Array) -> Array:
        """Returns the largest and the smallest load of an expert, 1 if all are equal."""
        highest, lowest = [], []
        at = 0
        for experts in self._experts:
            if not experts:
                continue
            part, at = counts[at : at + experts], at + experts
            mean = part.mean() if part.any() else np.nan
            highest.append(part.max() / mean)
            lowest.append(part.min() / mean)
        if not highest:
            return np.zeros(0)
        low = np.array(lowest)
        smallest = np.nan if np.isnan(low).all() else np.nanmin(low)
        return np.array([*highest, _highest(np.array(highest)), *lowest, smallest])

    # -- names and messages ----------------------------------------------------------------------

    def _make_names(self) -> list[str]:
        scopes = [*(w.scope for w in self._watched), "total"]
        kinds = ["activation", *(["output_grad"] if self._gradients else [])]
        names = [
            f"{k}/{s}/{scope}" for k in kinds for s in (*STATISTICS, "max") for scope in scopes
        ]
        if not self._why_no_logits:
            names += [f"attention/logit_max/{scope}" for scope in scopes]
        routed = [w.scope for w in self._watched if w.experts]
        if routed:
            loads = ("max", "min")
            names += [f"moe/expert_load_{s}/{scope}" for s in loads for scope in (*routed, "total")]
        return names

    def _tell(self, metric: str, reason: str) -> None:
        """Says once why a metric is absent."""
        if metric not in self._told:
            self._told.add(metric)
            about = {"probe": self.name, "metric": metric, "state": "absent", "reason": reason}
            self._around.report("monitor", about)


def _highest(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else float("nan")


def _why_no_logits(engine: Engine, is_asked_for: bool) -> str:
    """Returns why attention logits cannot be read; empty if they can."""
    if not is_asked_for:
        return "the setting attention is off"
    config = getattr(engine.model, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if isinstance(kind, str) and kind not in _SHOWS_LOGITS:
        return f"attention is {kind}, which does not show its logits; with sdpa or eager they are"
    return ""

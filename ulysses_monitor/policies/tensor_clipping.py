"""Clipping of each tensor, or each row, by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ulysses_monitor.policies.base import NORM, BuiltinPolicy, Targets
from ulysses_monitor.policies.clipping import clip_norm, is_usable
from ulysses_monitor.policies.columns import Array, fingerprint, parameter_values
from ulysses_monitor.records import Action, StepRecord

__all__ = ["AGC", "AdaGC"]


@dataclass(kw_only=True)
class AdaGC(BuiltinPolicy):
    """Clips each tensor by a moving average of its own norm.

    Source: arXiv:2502.11034 (Wang et al., 2025). For `warmup` steps, all gradients together are
    clipped to `absolute`, and each tensor's smallest norm is noted. After that, a tensor's norm is
    at most 1.05 times the moving average (0.98) of its clipped norms. A norm of zero, such as that
    of a LoRA A at its first step, is not noted: it would hold the tensor at zero for good.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_norm", "clip_each"})

    relative: Annotated[float, Field(gt=0, le=1000)] = 1.05
    """Factor on the moving average; a factor below 1 shrinks the limit at every step, to zero."""
    beta: Annotated[float, Field(gt=0, le=0.999999)] = 0.98
    """Decay of the moving average."""
    absolute: Annotated[float, Field(gt=0, le=10**9)] = 1.0
    """The norm of all gradients together during the warm-up."""
    warmup: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Steps at which all gradients are clipped together."""

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return ("grad/norm/param/*", NORM)

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, memory = history[-1], self.memory
        names, norms = parameter_values(record, "grad/norm")
        if not is_usable(float(norms.sum())):
            return
        tensors = fingerprint(names)
        if memory.setdefault("tensors", tensors) != tensors:
            memory.clear()  # the run trains other parameters than before
            memory["tensors"] = tensors
        seen = memory["seen"] = memory.get("seen", 0) + 1
        limits = np.asarray(memory.get("limits", np.zeros(len(names))))
        warming = seen <= self.warmup
        clip = self._clip_together if warming else self._clip_each
        clipped, limits = clip(norms, limits)
        memory["limits"] = limits.tolist()
        norm = record.get(NORM)
        if warming and norm > self.absolute:
            yield clip_norm(self.absolute, norm, "warm-up of the tensors' own limits")
        over = np.flatnonzero(clipped < norms)
        if not warming and len(over):
            yield Action(
                kind="clip_each",
                values={names[i]: float(clipped[i]) for i in over},
                targets=tuple(names[i] for i in over),
                reason=f"{len(over)} tensors are above their own moving average",
                read={f"grad/norm/param/{names[i]}": float(norms[i]) for i in over[:3]},
            )

    def _clip_together(self, norms: Array, limits: Array) -> tuple[Array, Array]:
        total = float(np.sqrt(np.square(norms).sum()))
        clipped = norms * min(1.0, self.absolute / total)
        smaller = (clipped > 0) & ((limits == 0) | (clipped < limits))
        return clipped, np.where(smaller, clipped, limits)

    def _clip_each(self, norms: Array, limits: Array) -> tuple[Array, Array]:
        known = limits > 0
        clipped = np.where(known, np.minimum(norms, self.relative * limits), norms)
        moved = self.beta * limits + (1 - self.beta) * clipped
        return clipped, np.where(known & (norms > 0), moved, np.where(known, limits, norms))


@dataclass(kw_only=True)
class AGC(BuiltinPolicy):
    """Clips each row of a gradient by its weights' norm, at every step.

    Source: arXiv:2102.06171 (Brock et al., 2021): ratio 0.01, weight norms of at least 0.001, and
    no clipping of the last linear layer.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"clip_rows"})

    ratio: Annotated[float, Field(gt=0, le=1_000_000)] = 0.01
    """Largest ratio of a row's gradient norm to its weights' norm."""
    targets: Targets = ("*",)
    """Patterns of parameter names."""

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        del history  # the policy does the same at every step
        yield Action(
            kind="clip_rows",
            values={"ratio": self.ratio},
            targets=self.targets,
            reason="rows are limited by their weights' norm",
        )

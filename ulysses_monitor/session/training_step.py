"""What a training says of one step itself: its loss, its tokens, its times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.capture import Part
from ulysses_monitor.records import schema_of
from ulysses_monitor.session.flops import TrainingFlops, peak_flops

__all__ = ["TrainingStep", "as_part"]


@dataclass
class TrainingStep:
    """Gathers one step on this rank.

    Attributes:
        began: when the step did, by `time.perf_counter`.
        parts: names and values per probe, once the gradients were read.
        sums: what was observed, over all ranks, once the gradients were read.
        overhead: seconds that the monitor took of the step.
    """

    began: float = field(default_factory=time.perf_counter)
    parts: list[Part] | None = None
    sums: Mapping[str, float] = field(default_factory=dict)
    overhead: float = 0.0
    _loss: Tensor | float = 0.0
    _has_loss: bool = False
    _tokens: Tensor | float = 0.0
    _loss_tokens: Tensor | float = 0.0
    _has_labels: bool = False
    _attended: Tensor | float = 0.0

    def observe(
        self,
        loss: Tensor | float | None,
        tokens: Tensor | float,
        loss_tokens: Tensor | float | None,
        attended: Tensor | float,
    ) -> None:
        """Adds a micro-batch; see `Monitor.observe`.

        Raises:
            InputError: `loss` is a tensor of several elements.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise InputError(
                f"monitor: observe(loss=...) got a tensor of shape {list(loss.shape)}; "
                "allowed is a scalar"
            )
        if loss is not None:
            self._loss = self._loss + (loss.detach() if isinstance(loss, Tensor) else loss)
            self._has_loss = True
        if loss_tokens is not None:
            self._loss_tokens = self._loss_tokens + loss_tokens
            self._has_labels = True
        self._tokens = self._tokens + tokens
        self._attended = self._attended + attended

    def observed(self) -> dict[str, Tensor | float]:
        """This rank's values, which travel in the step's vector and come back as `sums`."""
        return {
            "loss": self._loss,
            "has_loss": float(self._has_loss),
            "tokens": self._tokens,
            "loss_tokens": self._loss_tokens,
            "has_labels": float(self._has_labels),
            "attended": self._attended,
        }

    def metrics(self, engine: Engine, edited_norm: float | None = None) -> dict[str, float]:
        """Loss, label tokens, learning rates and the clipping to come, from sums and parts.

        Args:
            engine: what is trained.
            edited_norm: the gradients' norm where a policy has changed them.
        """
        metrics = {f"optim/lr/{i}": lr for i, lr in enumerate(engine.learning_rates())}
        if self.sums["has_loss"]:
            metrics["train/loss/total"] = self.sums["loss"] / self.sums["has_loss"]
        if self.sums["has_labels"]:
            metrics["train/loss_tokens/total"] = self.sums["loss_tokens"]
        clip_norm, norm = engine.clip_norm(), edited_norm
        if norm is None:
            norm = self._measured("grad/norm/total")
        if clip_norm is not None and norm is not None:
            metrics["grad/clip_coef/total"] = min(1.0, clip_norm / (norm + 1e-6))
        return metrics

    def times(self, seconds: float, flops: TrainingFlops, device: torch.device) -> dict[str, float]:
        """How long the step took, and what came of it; utilisation where the peak is known."""
        times = {"train/step_seconds/total": seconds}
        if tokens := self.sums["tokens"]:
            times["train/tokens_per_second/total"] = tokens / seconds
            if (peak := peak_flops(device)) is not None:
                done = flops.of_step(tokens, self.sums["attended"])
                times["train/mfu/total"] = done / (seconds * peak * world_size())
        return times

    def _measured(self, name: str) -> float | None:
        for schema, values in self.parts or ():
            if name in schema.index:
                return float(values[schema.index[name]])
        return None


def as_part(metrics: Mapping[str, float]) -> Part:
    """Names and values apart, as probes give them."""
    return schema_of(tuple(metrics)), np.array(list(metrics.values()), np.float64)

"""What a training reports about one step: its loss, its tokens, its times."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.capture import Part
from ulysses_monitor.records import Schema, StepRecord, schema_of
from ulysses_monitor.session.flops import TrainingFlops, peak_flops
from ulysses_monitor.session.model_facts import chance_loss, count_untied

__all__ = ["RecordBuilder", "TrainingStep", "as_part"]


@dataclass
class TrainingStep:
    """Gathers one step on this rank.

    Attributes:
        began: when the step began, by `time.perf_counter`.
        parts: names and values per probe, once the gradients were read.
        sums: what was observed, summed over ranks, once the gradients were read.
        sources: metrics from elsewhere and of what went in, once the gradients were read.
        was_read: whether the gradients were read, or reading them failed.
        overhead: seconds of the step that the monitor took.
        edited_norm: norm of the gradients if a policy changed them.
        clip_norm: norm to which a plain loop clipped, infinite if it did not; None if unknown.
        is_stale: whether the gradients changed after they had been read.
    """

    began: float = field(default_factory=time.perf_counter)
    parts: list[Part] | None = None
    sums: Mapping[str, float] = field(default_factory=dict)
    sources: dict[str, float] = field(default_factory=dict)
    was_read: bool = False
    overhead: float = 0.0
    edited_norm: float | None = None
    clip_norm: float | None = None
    is_stale: bool = False
    _loss: Tensor | float = 0.0
    _has_loss: float = 0.0
    _tokens: Tensor | float = 0.0
    _loss_tokens: Tensor | float = 0.0
    _has_labels: float = 0.0
    _attended: Tensor | float = 0.0
    _seconds: float = 0.0
    """From the step's start to its first loss; a backward pass waits for other ranks."""

    def observe(
        self,
        loss: Tensor | float | None,
        tokens: Tensor | float,
        loss_tokens: Tensor | float | None,
        attended: Tensor | float,
    ) -> None:
        """Adds a micro-batch; see `Monitor.observe`.

        Raises:
            InputError: a value is not a real number.
        """
        if loss is not None:
            self._seconds = self._seconds or time.perf_counter() - self.began
            self._loss = self._loss + _scalar("loss", loss)
            self._has_loss = self._has_loss or 1.0
        if loss_tokens is not None:
            self._loss_tokens = self._loss_tokens + _scalar("loss_tokens", loss_tokens)
            self._has_labels = self._has_labels or 1.0
        self._tokens = self._tokens + _scalar("tokens", tokens)
        self._attended = self._attended + _scalar("attended", attended)

    def miss(self, *, loss: bool = False, counts: bool = False) -> None:
        """Notes that a micro-batch could not be read, so that no rank has such metrics of the step.

        Args:
            loss: its loss is not known.
            counts: its tokens are not known: the step has neither counts nor speed.
        """
        if loss:
            self._has_loss = math.nan
        if counts:
            self._tokens = self._has_labels = math.nan

    def observed(self) -> dict[str, Tensor | float]:
        """Returns this rank's values, which travel in the step's vector and return as `sums`."""
        return {
            "loss": self._loss,
            "has_loss": self._has_loss,
            "tokens": self._tokens,
            "loss_tokens": self._loss_tokens,
            "has_labels": self._has_labels,
            "attended": self._attended,
            **(self._of_ranks() if world_size() > 1 else {}),
        }

    def _of_ranks(self) -> dict[str, Tensor | float]:
        """Returns what says how far ranks are apart."""
        return {
            "loss_squares": _square(self._loss),
            "seconds": self._seconds,
            "seconds_squares": self._seconds**2,
        }

    def metrics(self, engine: Engine) -> dict[str, float]:
        """Returns what is known before the step: loss, learning rates, `sources`, ..."""
        metrics = {f"optim/lr/{i}": lr for i, lr in enumerate(engine.learning_rates())}
        if self.sums["has_loss"] > 0:  # not NaN
            metrics["train/loss/total"] = self.sums["loss"] / self.sums["has_loss"]
            if "loss_squares" in self.sums:
                metrics["train/loss_rank_std/total"] = self._rank_std("loss")
                metrics["train/seconds_rank_std/total"] = self._rank_std("seconds")
            if not math.isnan(chance := chance_loss(engine.model)):
                metrics["train/loss_over_chance/total"] = metrics["train/loss/total"] / chance
        if (untied := count_untied(engine.model)) is not None:
            metrics["param/untied/total"] = float(untied)
        if self.sums["has_labels"] > 0:
            metrics["train/loss_tokens/total"] = self.sums["loss_tokens"]
        return {**metrics, **self.clip_metrics(engine.clip_norm()), **self.sources}

    def clip_metrics(self, clip_norm: float | None) -> dict[str, float]:
        """Returns the factor of clipping to a norm, 1 if that is infinite, nothing if unknown."""
        if clip_norm == math.inf:
            return {"grad/clip_coef/total": 1.0}
        norm = self.measured("grad/norm/total") if self.edited_norm is None else self.edited_norm
        if clip_norm is None or norm is None:
            return {}
        return {"grad/clip_coef/total": min(1.0, clip_norm / (norm + 1e-6))}

    def _rank_std(self, name: str) -> float:
        """Returns how far the ranks' values are apart; exactly 0 if they are equal."""
        count = self.sums["has_loss"]
        mean = self.sums[name] / count
        variance = self.sums[f"{name}_squares"] / count - mean**2
        is_rounding = variance < 1e-13 * mean**2  # of the sums, which are float64
        return 0.0 if is_rounding else math.sqrt(variance)

    def valid_parts(self, parts: Sequence[Part]) -> list[Part]:
        """Returns what was measured, without the gradients if they changed afterwards."""
        return [p for p in parts if not (self.is_stale and p[0].names[0].startswith("grad/norm/"))]

    def times(self, seconds: float, flops: TrainingFlops, device: torch.device) -> dict[str, float]:
        """Returns duration and speed of the step, and utilisation if the device's peak is known."""
        times = {"train/step_seconds/total": seconds}
        if (tokens := self.sums["tokens"]) > 0:
            times["train/tokens_per_second/total"] = tokens / seconds
            if (peak := peak_flops(device)) is not None:
                done = flops.of_step(tokens, self.sums["attended"])
                times["train/mfu/total"] = done / (seconds * peak * world_size())
        return times

    def measured(self, name: str) -> float | None:
        """Returns what probes measured; None if they did not."""
        for schema, values in self.parts or ():
            if name in schema.index:
                return float(values[schema.index[name]])
        return None


def _square(loss: Tensor | float) -> Tensor | float:
    return loss.double().square() if isinstance(loss, Tensor) else loss**2


def _scalar(name: str, value: Tensor | float) -> Tensor | float:
    """Checks at once what would otherwise fail where all ranks add up their numbers."""
    got = f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        if value.numel() == 1 and not (value.is_complex() or value.is_nested or value.is_meta):
            return value.detach()
        shape = "jagged" if value.is_nested else f"of shape {list(value.shape)}"
        got = f"a {value.dtype} tensor {shape} on {value.device}"
    else:
        with suppress(TypeError, ValueError):
            return float(value)
    raise InputError(f"monitor: observe({name}=...) got {got}; expected a real number")


def as_part(metrics: Mapping[str, float]) -> Part:
    """Splits names and values, as probes return them."""
    return schema_of(tuple(metrics)), np.array(list(metrics.values()), np.float64)


_SCHEMAS = 256
"""Schemas that are kept: a training that changes what it trains may have any number."""


class RecordBuilder:
    """Joins parts to records; steps with the same parts share one schema."""

    def __init__(self) -> None:
        self._schemas: dict[tuple[Schema, ...], Schema] = {}

    def build(self, parts: Sequence[Part], step: int) -> StepRecord:
        """Returns the record of `step` that has all values of `parts`."""
        schemas = tuple(schema for schema, _ in parts)
        if schemas not in self._schemas:
            if len(self._schemas) >= _SCHEMAS:
                self._schemas.clear()
            names = tuple(name for schema in schemas for name in schema.names)
            self._schemas[schemas] = Schema(names)
        values = np.concatenate([values for _, values in parts])
        return StepRecord(step, time.time(), self._schemas[schemas], values)

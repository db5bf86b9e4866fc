"""What goes into a step beside its loss: its batches, old gradients, the optimizer's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.batches import BatchReader
from ulysses_monitor.probes.carried import CarriedGradients
from ulysses_monitor.probes.noise import NoiseScale
from ulysses_monitor.session.model_facts import end_tokens
from ulysses_monitor.session.training_step import TrainingStep

__all__ = ["StepInputs", "optimizer_settings"]


class StepInputs:
    """Reads what goes into each step, on every rank.

    Args:
        engine: what is trained.
        guard: keeps a failure here away from the training.
        sample_every: the optimizer's settings are read at steps 1, 1 + N, 1 + 2N, ...
        special: ids of the tokenizer's special tokens, where they are known.
    """

    def __init__(
        self, engine: Engine, guard: Guard, sample_every: int, special: Sequence[int] = ()
    ) -> None:
        self._engine, self._guard, self._sample_every = engine, guard, sample_every
        self._batches = BatchReader(end_tokens(engine.model), special)
        self._carried = CarriedGradients(engine, guard)
        self._noise = NoiseScale(engine)

    def see_batch(self, batch: Any, *, shifted: bool = True) -> None:
        """Looks at a micro-batch of the coming step; see `BatchReader.add`."""

        def add() -> bool:
            with torch.no_grad():
                self._batches.add(batch, shifted=shifted)
            return True

        if not self._guard.call("looking at the batches", add, False):
            self._batches.miss()

    def see_loss(self, loss: object, step: int) -> None:
        """Looks at the gradients where a further loss of `step` is observed, if it is one."""
        if loss is None:
            return
        passes, is_sampled = self._carried.passes, self._is_sampled(step)
        self._guard.call(
            "measuring the gradient's noise",
            lambda: self._noise.see_loss(passes, is_sampled=is_sampled),
            None,
        )

    def _is_sampled(self, step: int) -> bool:
        return (step - 1) % self._sample_every == 0

    def take_sums(self) -> dict[str, Tensor | float]:
        """Returns this rank's sums of the step, the same names on all ranks; NaN if that failed."""

        def take() -> dict[str, Tensor | float]:
            with torch.no_grad():
                noise = self._noise.take_sums(self._carried.passes)
                return {**self._batches.take_sums(), **self._carried.take_sums(), **noise}

        parts = (*BatchReader.SUMS, *CarriedGradients.SUMS, *NoiseScale.SUMS)
        unknown: dict[str, Tensor | float] = dict.fromkeys(parts, math.nan)
        return self._guard.call("looking at what goes into a step", take, unknown)

    def metrics(self, current: TrainingStep, step: int) -> dict[str, float]:
        """Returns the metrics of a step whose gradients were read.

        Args:
            current: the step.
            step: its number.
        """
        sums, norm = current.sums, current.measured("grad/norm/total")
        found = self._batches.metrics(sums) | self._carried.metrics(sums)
        if norm is not None:
            tokens = sums["loss_tokens"] if sums["has_labels"] > 0 else sums["tokens"]
            found |= self._noise.metrics(sums, norm, tokens)
        if self._is_sampled(step):
            found |= self._guard.call(
                "reading the optimizer's settings", lambda: optimizer_settings(self._engine), {}
            )
        return found

    def end_step(self) -> None:
        """Looks at the gradients that the optimizer's step leaves behind."""
        self._guard.call("looking at the gradients after a step", self._carried.end_step, None)

    def close(self) -> None:
        """Removes every hook."""
        self._carried.close()


def optimizer_settings(engine: Engine) -> dict[str, float]:
    """Returns what the optimizer's groups set beside their rates, as far as it is numbers."""
    found: dict[str, float] = {}
    for i, group in enumerate(engine.optimizer.param_groups):
        settings = {name: group.get(name) for name in ("eps", "weight_decay", "momentum")}
        betas = group.get("betas")
        if isinstance(betas, tuple | list) and len(betas) == 2:
            settings |= dict(zip(("beta1", "beta2"), betas, strict=True))
        for name, value in settings.items():
            if isinstance(value, int | float):
                found[f"optim/{name}/{i}"] = float(value)
    return found

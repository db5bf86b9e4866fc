"""Edits the gradients of a step, on every rank alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.sums import statistics
from ulysses_monitor.records import Action
from ulysses_monitor.steering.acting.edits import EDITS, Targets

__all__ = ["Effect", "GradientEditor"]


@dataclass(frozen=True)
class Effect:
    """What a list of actions did.

    Attributes:
        tensors: for each action, the names of its target parameters, by index.
        norm: norm of all gradients after the actions, which the engine will clip by.
    """

    tensors: list[dict[int, str]]
    norm: float


class GradientEditor:
    """Edits gradients before the engine clips them.

    Args:
        engine: the engine whose gradients are edited.
        seed: seed of the noise.
    """

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine, self._seed = engine, seed

    def apply(self, actions: Sequence[Action], step: int) -> Effect:
        """Performs `actions` in order; every rank calls it with the same ones.

        A rank on which an edit fails still takes part in the collectives.

        Args:
            actions: actions that edit gradients, at least one.
            step: the optimizer step.

        Raises:
            Exception: whatever an edit raised on this rank.
        """
        rounds = [Targets(self._engine, action, step, self._seed) for action in actions]
        error: Exception | None = None
        for targets in rounds:
            edit = EDITS[targets.action.kind]
            sums = edit.sum_sizes(targets)
            try:
                edit.apply(targets)
            except Exception as raised:  # noqa: BLE001 - raised again below
                error = raised
                for size in sums[len(targets.summed) :]:
                    targets.sum_over_ranks(torch.zeros(size, dtype=torch.float64))
        self._engine.commit_gradients()
        norm = self._norm(rounds[0])
        if error is not None:
            raise error
        return Effect([targets.names() for targets in rounds], norm)

    def _norm(self, any_targets: Targets) -> float:
        grads = [s.grad for s in self._engine.shards() if s.is_counted and s.grad is not None]
        squares = torch.zeros(1, dtype=torch.float64)
        if grads:
            squares = statistics(grads)[0].sum().reshape(1)
        total = any_targets.sum_over_ranks(squares)
        return float(total.sqrt() / any_targets.scale())

"""Copies of weights and optimizer state, to roll back to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ulysses_monitor.engines import Engine

__all__ = ["Snapshot", "local_part", "updated_tensors"]


@dataclass(frozen=True)
class Snapshot:
    """Weights and optimizer state of this rank, in host memory.

    Attributes:
        step: the last optimizer step that it contains.
        weights: copies of the tensors that the optimizer updates, by `id`.
        state: the optimizer's state, by `id` of the tensor.
        buffers: the model's buffers, by name.
    """

    step: int
    weights: dict[int, Tensor]
    state: dict[int, dict[str, Any]]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, engine: Engine, step: int) -> Snapshot:
        """Copies what this rank holds now."""
        optimizer = engine.optimizer
        updated = list(updated_tensors(optimizer))
        return cls(
            step,
            {id(p): _copy(p) for p in updated},
            {
                id(p): {k: _copy(v) if isinstance(v, Tensor) else v for k, v in state.items()}
                for p, state in optimizer.state.items()
            },
            {name: _copy(buffer) for name, buffer in engine.model.named_buffers()},
        )

    def restore(self, engine: Engine) -> None:
        """Restores everything in place and removes state that was created since."""
        optimizer = engine.optimizer
        for param in updated_tensors(optimizer):
            if id(param) in self.weights:
                local_part(param).copy_(self.weights[id(param)])
        for param in list(optimizer.state):
            kept = self.state.get(id(param))
            if kept is None:
                del optimizer.state[param]
            else:
                _restore_state(optimizer.state[param], kept)
        for name, buffer in engine.model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])


def _restore_state(held: dict[str, Any], kept: dict[str, Any]) -> None:
    for name in set(held) - set(kept):
        del held[name]
    for name, value in kept.items():
        if isinstance(value, Tensor):
            local_part(held[name]).copy_(value)
        else:
            held[name] = value


def updated_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yields the tensors that the optimizer updates, each once; ZeRO-3 has them in its state."""
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    yield from {id(p): p for p in [*groups, *optimizer.state]}.values()


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor, which shares its memory."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def _copy(tensor: Tensor) -> Tensor:
    return local_part(tensor).to("cpu", copy=True)

"""What most engines have in common: the model's own parameters and the gradients they carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_monitor.engines.base import AdamUpdate, Shard
from ulysses_monitor.engines.support import (
    torch_adam_update,
    trainable_parameters,
    unwrap,
    write_gradient,
)

__all__ = ["ParameterView"]


class ParameterView:
    """The part of an `Engine` that reads whole parameters and writes the gradients of shards.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer that does the arithmetic.

    Raises:
        InputError: the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = unwrap(model)
        self.optimizer = optimizer
        self._named = trainable_parameters(self.model)

    def parameters(self) -> list[tuple[str, int]]:
        """See `Engine.parameters`."""
        return [(name, p.numel()) for name, p in self._named]

    def shapes(self) -> list[torch.Size]:
        """See `Engine.shapes`."""
        return [p.shape for _, p in self._named]

    def full_parameter(self, param: nn.Parameter) -> Tensor | None:
        """See `Engine.full_parameter`."""
        return param.detach()

    def local_parameter(self, param: nn.Parameter) -> Tensor:
        """See `Engine.local_parameter`."""
        return param.detach()

    def learning_rates(self) -> list[float]:
        """See `Engine.learning_rates`."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def adam_update(self, settings: Mapping[str, Any]) -> AdamUpdate | None:
        """See `Engine.adam_update`."""
        return torch_adam_update(self.optimizer, settings)

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """See `Engine.set_gradient`; the gradient that was read is the one the engine uses."""
        write_gradient(shard, value, self._named[shard.index][0])

    def commit_gradients(self) -> None:
        """See `Engine.commit_gradients`."""

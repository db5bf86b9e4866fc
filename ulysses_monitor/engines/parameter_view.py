"""What most engines answer alike: the model's own parameters and the gradients they carry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ulysses_monitor.engines.base import Shard, trainable_parameters, unwrapped

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
        self.model = unwrapped(model)
        self.optimizer = optimizer
        self._named = trainable_parameters(self.model)

    def parameters(self) -> list[tuple[str, int]]:
        """See `Engine.parameters`."""
        return [(name, p.numel()) for name, p in self._named]

    def shapes(self) -> list[torch.Size]:
        """See `Engine.shapes`."""
        return [p.shape for _, p in self._named]

    def whole(self, param: nn.Parameter) -> Tensor | None:
        """See `Engine.whole`."""
        return param.detach()

    def piece(self, param: nn.Parameter) -> Tensor:
        """See `Engine.piece`."""
        return param.detach()

    def learning_rates(self) -> list[float]:
        """See `Engine.learning_rates`."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """See `Engine.set_gradient`; the gradient that was read is the one the engine uses."""
        if shard.grad is None:
            name, _ = self._named[shard.index]
            raise ValueError(f"parameter {name} got no gradient in this step, so none can be set")
        shard.grad.copy_(value)

    def gradients_written(self) -> None:
        """See `Engine.gradients_written`."""

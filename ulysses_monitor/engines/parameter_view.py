"""What most engines have in common: the model's own parameters and the gradients they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._note_choice()

    def parameters(self) -> list[tuple[str, int]]:
        """See `Engine.parameters`."""
        return [(name, self._numel(p)) for name, p in self._named]

    def _numel(self, param: nn.Parameter) -> int:
        """Returns the number of elements of the full parameter."""
        return param.numel()

    # -- what is trained -----------------------------------------------------------------------

    def find_change(self) -> list[tuple[str, int]] | None:
        """See `Engine.find_change`."""
        if [p.requires_grad for p in self._every] == self._flags and self._held == self._holds():
            return None
        named = trainable_parameters(self.model)
        if [(n, id(p)) for n, p in named] == [(n, id(p)) for n, p in self._named]:
            self._note_choice()  # the optimizer's groups are others
            self._arrange()
            return None
        self._check_trained(named)
        return [(name, self._numel(p)) for name, p in named]

    def follow(self) -> None:
        """See `Engine.follow`."""
        self._named = trainable_parameters(self.model)
        self._note_choice()
        self._arrange()

    def _note_choice(self) -> None:
        """Notes what says which parameters are trained, to see when it changes.

        New parameters of the model count from when the optimizer holds them.
        """
        self._every = list(self.model.parameters())
        self._flags = [p.requires_grad for p in self._every]
        self._held = self._holds()

    def _holds(self) -> list[list[int]]:
        """Returns the optimizer's groups, as far as they may change."""
        return [[id(group), *map(id, group["params"])] for group in self.optimizer.param_groups]

    def _check_trained(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Checks that the engine trains parameters, some of which became trainable.

        Raises:
            InputError: it does not.
        """

    def _arrange(self) -> None:
        """Derives from `_named` and from the optimizer's groups what a view keeps of them."""

    # -- whole parameters ----------------------------------------------------------------------

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

    def grad_scale(self) -> Tensor | float:
        """See `Engine.grad_scale`."""
        return 1.0

    def loss_scale(self) -> Tensor | float:
        """See `Engine.loss_scale`."""
        return self.grad_scale()

    def adam_update(self, settings: Mapping[str, Any]) -> AdamUpdate | None:
        """See `Engine.adam_update`."""
        return torch_adam_update(self.optimizer, settings)

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """See `Engine.set_gradient`; the gradient that was read is the one the engine uses."""
        write_gradient(shard, value, self._named[shard.index][0])

    def commit_gradients(self) -> None:
        """See `Engine.commit_gradients`."""

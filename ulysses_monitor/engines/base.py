"""What every engine view offers: a training engine's local shards, and when to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ulysses_monitor.patching import Undo

__all__ = ["Engine", "Shard", "trainable_parameters"]


@dataclass(frozen=True)
class Shard:
    """The part of one trainable parameter that this rank reads.

    Attributes:
        index: position of the parameter in the engine's `parameters()`.
        offset: where the part starts in the flattened whole parameter, in elements.
        param: the part itself, in the precision the optimizer updates.
        grad: its gradient, reduced over ranks and unclipped, still times `Engine.grad_scale`;
            None where the parameter got no gradient in this step.
        state: the optimizer's tensors for the part, by the optimizer's own names
            (``exp_avg``, ``exp_avg_sq``); empty before the first step.
    """

    index: int
    offset: int
    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]


class Engine(Protocol):
    """A view of a training engine; all ranks' shards together are each parameter exactly once."""

    name: str
    """What was found, for run.json: ``plain``, ``ddp``, ``deepspeed-zero2``."""
    device: torch.device
    """Where the reduced vector of partial sums lives."""

    def parameters(self) -> list[tuple[str, int]]:
        """Name and number of elements of every trainable parameter, whole, alike on all ranks."""
        ...

    def shards(self) -> Iterator[Shard]:
        """This rank's shards; only valid just before an optimizer step, see `hook_step`."""
        ...

    def grad_scale(self) -> float:
        """The factor by which the gradients are still multiplied (the loss scale), else 1."""
        ...

    def clip_norm(self) -> float | None:
        """The norm that the engine will clip to; None where it does not clip or does not say."""
        ...

    def learning_rates(self) -> list[float]:
        """The learning rate of each parameter group that the coming step uses."""
        ...

    def hook_step(self, before: Callable[[], None], after: Callable[[], None]) -> Undo:
        """Calls `before` and `after` around each optimizer step.

        At `before` the gradients are accumulated and reduced, and the engine has not clipped them.
        """
        ...


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters by their full names, tied ones once, in the model's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

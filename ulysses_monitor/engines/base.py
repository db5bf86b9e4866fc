"""The engine contract: how the monitor reads and steers one training engine.

An engine is how a training distributes its parameters and takes its optimizer steps: plain torch,
DDP, DeepSpeed ZeRO, FSDP2. An engine view answers three questions about it, alike on all ranks:

- What does this rank hold? (`parameters`, `shapes`, `counted_indices`, `shards`, `replicas`)
- What happens to the gradients next? (`grad_scale`, `clip_norm`, `learning_rates`)
- When is a step? (`hook_step`)
- Are other parameters trained than before? (`find_change`, `follow`)

and writes gradients back (`set_gradient`, then `commit_gradients`).

To add an engine:

1. Write a class with the members of `Engine`. `PlainEngine` is the base for engines that keep
   ``param.grad``; `DeepSpeedView` is the base for DeepSpeed. ``support.py`` has what views share.
2. Cover every trainable parameter exactly once with the counted shards of all ranks, without any
   communication in `shards`.
3. Detect the engine in `find_engine`, and refuse with an `InputError` every variant that the view
   would read wrongly.
4. Add it to the exactness tests, which compare every metric with the same training on one process
   in float64.

Legend: P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.common.patching import Undo

__all__ = ["AdamUpdate", "Engine", "Replica", "Shard", "StepCallback", "do_nothing"]


def do_nothing() -> None:
    """Does nothing."""


StepCallback = Callable[[bool], None]
"""Called after an optimizer step with True, or with False if an overflow made the engine skip it.
"""

AdamUpdate = Literal["adam", "adamw"]
"""Adam's update, with weight decay in the gradient (``adam``) or apart from it (``adamw``)."""


@dataclass(frozen=True)
class Shard:
    """The part of one trainable parameter that this rank holds.

    Attributes:
        index: position of the parameter in the engine's `parameters()`.
        offset: first element of the part in the flattened parameter; the part is contiguous there.
        param: the part itself, in the precision that the optimizer updates.
        grad: its gradient, reduced over ranks and not yet clipped, still multiplied by
            `Engine.grad_scale`; None if the parameter got no gradient in this step. Read only:
            write with `Engine.set_gradient`.
        state: the optimizer's tensors for the part, under the optimizer's own names
            (``exp_avg``, ``exp_avg_sq``); empty before the first step.
        settings: the optimizer's parameter group: ``lr``, ``betas``, ...; empty if the optimizer
            does not hold the parameter.
        steps: the optimizer's step count for the part; None if it keeps none.
        is_counted: whether this rank counts the part in sums over ranks; False for a replica that
            another rank counts.
        has_state: whether the optimizer keeps anything for the part, also what `state` cannot
            show: quantized, projected and factored moments.
    """

    index: int
    offset: int
    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: Tensor | float | None = None
    is_counted: bool = True
    has_state: bool = False


@dataclass(frozen=True)
class Replica:
    """A parameter and its gradient that several ranks must hold bit for bit the same."""

    index: int
    param: Tensor
    grad: Tensor | None


class Engine(Protocol):
    """A view of a training engine.

    The counted shards of all ranks together cover each trainable parameter exactly once.
    """

    name: str
    """The engine's name in run.json: ``plain``, ``ddp``, ``deepspeed-zero2``."""
    device: torch.device
    """Device of the vector that the ranks reduce."""
    model: nn.Module
    """The user's model, without wrappers."""
    optimizer: torch.optim.Optimizer
    """The optimizer that does the arithmetic, without wrappers."""
    group: dist.ProcessGroup | None
    """The ranks that share or replicate the parameters; None on a single process."""
    replica_sets: int
    """Number of sets of ranks that hold the same replicas; 0 if nothing is replicated."""
    replica_set: int
    """Index of the set that this rank belongs to."""
    clips_in_step: bool
    """Whether the engine clips inside its own step; if not, the caller clips before the step."""
    replicates_gradients: bool
    """Whether the ranks of a set also hold the same gradients."""

    def parameters(self) -> list[tuple[str, int]]:
        """Returns name and number of elements of every full trainable parameter [P].

        The list is the same on all ranks.
        """
        ...

    def shapes(self) -> list[torch.Size]:
        """Returns the shape of every full trainable parameter [P], in the order of `parameters`."""
        ...

    def counted_indices(self) -> list[int]:
        """Returns the indices of the parameters of which this rank counts a shard.

        The list stays the same until `follow`.
        """
        ...

    def find_change(self) -> list[tuple[str, int]] | None:
        """Returns `parameters` as `follow` would make them; None if they would be the same.

        Cheap enough for each step, and without communication. Changes nothing that another rank
        must know of.

        Raises:
            InputError: the engine does not train a parameter that became trainable.
        """
        ...

    def follow(self) -> None:
        """Reads from now on the parameters that are trainable now.

        Every rank calls it, after `find_change` returned the same on all of them.
        """
        ...

    def shards(self) -> Iterator[Shard]:
        """Yields this rank's shards, without communication.

        Gradients are valid only just before a step, see `hook_step`.
        """
        ...

    def replicas(self) -> Iterator[Replica]:
        """Yields what this rank must hold the same as the other ranks of its set."""
        ...

    def full_parameter(self, param: nn.Parameter) -> Tensor | None:
        """Returns the full parameter, trainable or frozen, without communication.

        None means that this rank holds only a part of it.
        """
        ...

    def local_parameter(self, param: nn.Parameter) -> Tensor:
        """Returns this rank's part of any parameter; all of it if it is not sharded."""
        ...

    def grad_scale(self) -> Tensor | float:
        """Returns the factor that the gradients still carry (the loss scale); 1 without one."""
        ...

    def loss_scale(self) -> Tensor | float:
        """Returns the factor that this step's losses carried in the backward pass; 1 without one.

        The gradients carry it until someone unscales them, see `grad_scale`.
        """
        ...

    def clip_norm(self) -> float | None:
        """Returns the norm that the engine will clip to, inf for none; None if it is unknown."""
        ...

    def learning_rates(self) -> list[float]:
        """Returns the learning rate that the coming step uses, for each parameter group."""
        ...

    def adam_update(self, settings: Mapping[str, Any]) -> AdamUpdate | None:
        """Returns which of Adam's updates the optimizer's `step` computes; None for any other.

        Args:
            settings: the parameter group.
        """
        ...

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """Replaces a shard's gradient, so that the engine clips and steps with the new one.

        All ranks that hold a replica must write the same values. Call `commit_gradients` after
        the last one.

        Args:
            shard: a shard of this step, counted or not.
            value: the new gradient, with the shape and the scale of ``shard.grad``.

        Raises:
            ValueError: the parameter got no gradient in this step.
        """
        ...

    def commit_gradients(self) -> None:
        """Ends a round of `set_gradient`. Every rank must call it, even if it wrote nothing."""
        ...

    def hook_step(
        self,
        before: Callable[[], None],
        after: StepCallback,
        ended: Callable[[], None] = do_nothing,
    ) -> Undo:
        """Hooks every optimizer step.

        Args:
            before: called when the gradients are accumulated and reduced, before the engine clips.
            after: called after the optimizer's step, before any scheduler that the engine runs
                itself changes the parameter groups.
            ended: called after the engine's step; here the engine can be saved, or an exception
                can leave the training.

        Returns:
            A function that removes the hooks.
        """
        ...

"""What every engine view offers: a training engine's local shards, and when to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo

__all__ = [
    "Engine",
    "Replica",
    "Shard",
    "StepCallback",
    "assign_parameters",
    "check_spans_world",
    "do_nothing",
    "select_state",
    "trainable_parameters",
    "unwrap",
    "write_gradient",
]


def do_nothing() -> None:
    """Does nothing."""


StepCallback = Callable[[bool], None]
"""Called after an optimizer step; told whether it was done, or skipped for an overflow."""


@dataclass(frozen=True)
class Shard:
    """The part of one trainable parameter that this rank holds.

    Attributes:
        index: position of the parameter in the engine's `parameters()`.
        offset: where the part starts in the flattened whole parameter, in elements; the part is
            contiguous there.
        param: the part itself, in the precision the optimizer updates.
        grad: its gradient, reduced over ranks and unclipped, still times `Engine.grad_scale`;
            None where the parameter got no gradient in this step. Read it; write it with
            `Engine.set_gradient`.
        state: the optimizer's tensors for the part, by the optimizer's own names
            (``exp_avg``, ``exp_avg_sq``); empty before the first step.
        settings: the optimizer's parameter group: ``lr``, ``betas``, ...
        steps: the optimizer's own count of steps for the part; None where it keeps none.
        is_counted: whether this rank counts the part in sums over ranks; false for a replica that
            another rank counts.
    """

    index: int
    offset: int
    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: Tensor | float | None = None
    is_counted: bool = True


@dataclass(frozen=True)
class Replica:
    """A tensor that several ranks must hold bit by bit alike: a parameter, and its gradient."""

    index: int
    param: Tensor
    grad: Tensor | None


class Engine(Protocol):
    """A view of a training engine.

    All ranks' counted shards together are each trainable parameter exactly once.
    """

    name: str
    """What was found, for run.json: ``plain``, ``ddp``, ``deepspeed-zero2``."""
    device: torch.device
    """Where the reduced vector of partial sums lives."""
    model: nn.Module
    """The user's model, without wrappers."""
    optimizer: torch.optim.Optimizer
    """The optimizer that does the arithmetic, without wrappers."""
    group: dist.ProcessGroup | None
    """The ranks over which the parameters are sharded or replicated; None where there is one."""
    replica_sets: int
    """Number of sets of ranks that hold the same replicas; 0 where nothing is replicated."""
    replica_set: int
    """Which of them this rank belongs to."""
    clips_in_step: bool
    """Whether the engine's own step clips; where not, the caller does, before the step."""
    replicates_gradients: bool
    """Whether the ranks of a set hold the same gradients, too."""

    def parameters(self) -> list[tuple[str, int]]:
        """Name and number of elements of every trainable parameter, whole, alike on all ranks."""
        ...

    def shapes(self) -> list[torch.Size]:
        """Shape of every trainable parameter, whole, in the order of `parameters`."""
        ...

    def counted_indices(self) -> list[int]:
        """Indices of the parameters of which this rank counts a shard; never changes."""
        ...

    def shards(self) -> Iterator[Shard]:
        """This rank's shards; gradients are only there just before a step, see `hook_step`."""
        ...

    def replicas(self) -> Iterator[Replica]:
        """What this rank holds alike with the other ranks of its set."""
        ...

    def full_parameter(self, param: nn.Parameter) -> Tensor | None:
        """The whole parameter, trainable or frozen, without communication; None if sharded."""
        ...

    def local_parameter(self, param: nn.Parameter) -> Tensor:
        """This rank's part of any parameter; ranks that hold it all get the whole."""
        ...

    def grad_scale(self) -> Tensor | float:
        """The factor by which the gradients are still multiplied (the loss scale), else 1."""
        ...

    def clip_norm(self) -> float | None:
        """The norm that the engine will clip to; None where it does not clip or does not say."""
        ...

    def learning_rates(self) -> list[float]:
        """The learning rate of each parameter group that the coming step uses."""
        ...

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """Replaces a shard's gradient, so that the engine's own clipping and step see it.

        Ranks that hold a replica must all write the same. Call `commit_gradients` afterwards.

        Args:
            shard: a shard of this step, counted or not.
            value: the new gradient, shaped as ``shard.grad`` and as much scaled as it.

        Raises:
            ValueError: the parameter got no gradient in this step.
        """
        ...

    def commit_gradients(self) -> None:
        """Completes a round of `set_gradient`; every rank calls it, also one that wrote none."""
        ...

    def hook_step(
        self,
        before: Callable[[], None],
        after: StepCallback,
        ended: Callable[[], None] = do_nothing,
    ) -> Undo:
        """Calls `before` and `after` around each optimizer step, and `ended` after the engine's.

        At `before` the gradients are accumulated and reduced, and the engine has not clipped them.
        At `after` no scheduler of the engine's own has changed the settings yet; at `ended` the
        engine may be saved, and left by an exception.
        """
        ...


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module behind DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters by their full names, tied ones once, in the model's order.

    Raises:
        InputError: there is none.
    """
    named = [
        # Wrapping for compilation or checkpointing must not change what a metric is called.
        (name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""), p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    if not named:
        raise InputError("monitor: the model has no trainable parameter, so nothing to watch")
    return named


def select_state(tensors: Mapping[str, object], param: Tensor) -> dict[str, Tensor]:
    """Those of an optimizer's state that are plain floating tensors shaped as `param`.

    Quantized states (8-bit optimizers) are neither, and are not measured as if they were.
    """
    return {
        name: value
        for name, value in tensors.items()
        if type(value) is Tensor and value.shape == param.shape and value.is_floating_point()
    }


def assign_parameters(numels: list[int], parts: int, part: int) -> list[int]:
    """Indices of what one of `parts` readers reads: largest first to the least loaded reader."""
    load, own = [0] * parts, []
    for i in sorted(range(len(numels)), key=lambda i: -numels[i]):
        reader = load.index(min(load))
        load[reader] += numels[i]
        if reader == part:
            own.append(i)
    return sorted(own)


def write_gradient(shard: Shard, value: Tensor, name: str) -> None:
    """`Engine.set_gradient` where the gradient that was read is the one the engine uses.

    Raises:
        ValueError: the parameter got no gradient in this step.
    """
    if shard.grad is None:
        raise ValueError(f"parameter {name} got no gradient in this step, so none can be set")
    shard.grad.copy_(value)


def check_spans_world(group: dist.ProcessGroup, what: str) -> None:
    """Refuses an engine that spreads parameters over a part of the ranks only.

    Raises:
        InputError: it does; sums over ranks would mix different parameters.
    """
    size, world = dist.get_world_size(group), dist.get_world_size()
    if size != world:
        raise InputError(
            f"monitor: {what} spans {size} of {world} ranks; pipeline and tensor parallelism are "
            "not supported, allowed is one group of all ranks"
        )

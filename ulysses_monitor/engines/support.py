"""What engine views share: finding parameters, sharing them out, writing gradients.

Legend: P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.base import AdamUpdate, Shard

__all__ = [
    "assign_parameters",
    "check_spans_world",
    "defer",
    "is_compiled",
    "own_step",
    "refuse_lbfgs",
    "select_state",
    "strip_wrappers",
    "torch_adam_update",
    "trainable_parameters",
    "unwrap",
    "write_gradient",
]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the user's module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the module, or a wrapper around it."""
    inner = getattr(model, "module", None)
    return hasattr(model, "_orig_mod") or (isinstance(inner, nn.Module) and is_compiled(inner))


def strip_wrappers(name: str) -> str:
    """Returns a module's or parameter's name without what compiling and checkpointing insert.

    Wrapping a model must not change the names of its metrics.
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the trainable parameters with their full names, in the model's order.

    Tied parameters appear once.

    Raises:
        InputError: no parameter is trainable.
    """
    named = [(strip_wrappers(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise InputError(
            "monitor: the model has no trainable parameters; expected at least one parameter with "
            "requires_grad=True"
        )
    return named


def select_state(tensors: Mapping[str, object], param: Tensor) -> dict[str, Tensor]:
    """Returns the optimizer's plain floating-point tensors that have the shape of `param`.

    Quantized state (8-bit optimizers) is not, so its codes are not measured as if they were values.
    """
    return {
        name: value
        for name, value in tensors.items()
        if type(value) is Tensor
        and value.shape == param.shape
        and value.is_floating_point()
        and value.element_size() > 1  # float8 needs a scale, which is elsewhere
    }


def defer(
    call: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Calls something when a step's gradients are there: now, or once the step's closure has run.

    Args:
        call: called once.
        args: what the step gets, with the optimizer itself first.
        kwargs: likewise.

    Returns:
        What the step gets instead, for a hook that runs before it; None for no change.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        call()
        return None
    is_done = False

    def run(*given: Any, **named: Any) -> Any:
        nonlocal is_done
        result = closure(*given, **named)
        if not is_done:
            is_done = True
            call()
        return result

    if "closure" in kwargs:
        return args, {**kwargs, "closure": run}
    return (args[0], run, *args[2:]), kwargs


def refuse_lbfgs(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that makes several gradients in one step.

    Raises:
        InputError: the optimizer is an `LBFGS`.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            f"monitor: the optimizer is {type(optimizer).__name__}, which calls its closure "
            "several times a step; expected an optimizer that takes one gradient a step"
        )


def own_step(optimizer: type[torch.optim.Optimizer]) -> object:
    """Returns the `step` of an optimizer's class, without what torch wraps around every `step`.

    torch wraps the `step` of a class, also an inherited one, when it makes the first object of it.
    """
    step: Any = optimizer.step
    here = torch.optim.Optimizer.profile_hook_step.__code__.co_filename
    while hasattr(step, "__wrapped__") and step.__code__.co_filename == here:
        step = step.__wrapped__
    return step


def torch_adam_update(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> AdamUpdate | None:
    """Implements `Engine.adam_update` for torch's own `Adam` and `AdamW`.

    A class that inherits from them and has a `step` of its own may compute anything.
    """
    step = own_step(type(optimizer))
    if step not in (own_step(torch.optim.Adam), own_step(torch.optim.AdamW)):
        return None
    # Before torch 2.7 AdamW had a step of its own, and groups did not say what they do.
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    return "adamw" if settings.get("decoupled_weight_decay", is_adamw) else "adam"


def assign_parameters(numels: list[int], readers: int, reader: int) -> list[int]:
    """Returns the indices of the parameters that one of several readers reads, ascending.

    The largest parameter goes first, each to the reader with the fewest elements so far.

    Args:
        numels: number of elements of each parameter [P].
        readers: number of readers.
        reader: index of this reader.
    """
    load, own = [0] * readers, []
    for i in sorted(range(len(numels)), key=lambda i: -numels[i]):
        lightest = load.index(min(load))
        load[lightest] += numels[i]
        if lightest == reader:
            own.append(i)
    return sorted(own)


def write_gradient(shard: Shard, value: Tensor, name: str) -> None:
    """Implements `Engine.set_gradient` for engines that step with the tensor in ``shard.grad``.

    Raises:
        ValueError: the parameter got no gradient in this step.
    """
    if shard.grad is None:
        raise ValueError(f"parameter {name} got no gradient in this step, so none can be set")
    shard.grad.copy_(value)


def check_spans_world(group: dist.ProcessGroup, what: str) -> None:
    """Checks that an engine distributes the parameters over all ranks.

    Raises:
        InputError: it uses only some of them, so sums over ranks would mix different parameters.
    """
    size, world = dist.get_world_size(group), dist.get_world_size()
    if size != world:
        raise InputError(
            f"monitor: {what} spans {size} of {world} ranks; expected one group of all ranks "
            "(pipeline and tensor parallelism are not supported)"
        )

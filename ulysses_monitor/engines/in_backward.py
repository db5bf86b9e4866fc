"""Refuses trainings that update each parameter during the backward pass, to save memory.

Their gradients are gone when ``optimizer.step`` is called, so nothing could be read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.support import strip_wrappers

__all__ = ["refuse_updates_in_backward"]

_EXPECTED = "expected an optimizer whose step updates all parameters"


def refuse_updates_in_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose `step` does nothing, and parameters that hooks update.

    Raises:
        InputError: the parameters are updated during the backward pass.
    """
    kind = type(optimizer)
    if any(c.__name__ == "LayerWiseDummyOptimizer" for c in kind.__mro__):
        raise InputError(
            f"monitor: the optimizer is {kind.__name__}, whose step does nothing, because each "
            f"layer is updated during the backward pass; {_EXPECTED}: give optim without "
            "_layerwise, such as galore_adamw"
        )
    if callable(getattr(optimizer, "fused_backward", None)):
        raise InputError(
            f"monitor: the optimizer is {kind.__name__}, which updates each parameter during the "
            f"backward pass; {_EXPECTED}, such as adamw_torch"
        )
    for name, param in model.named_parameters():
        if (found := next(_optimizers_in_backward(param), None)) is not None:
            raise InputError(
                f"monitor: parameter {strip_wrappers(name)} is updated during the backward pass by "
                f"{type(found).__name__}; {_EXPECTED}: step it after the backward pass, without "
                "_apply_optimizer_in_backward and register_post_accumulate_grad_hook"
            )


def _optimizers_in_backward(param: Any) -> Iterator[torch.optim.Optimizer]:
    """Yields the optimizers that torch or the user's hooks step when the gradient is there."""
    yield from getattr(param, "_in_backward_optimizers", ())
    for hook in (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values():
        for value in _values_in(hook):
            every = value.values() if isinstance(value, Mapping) else [value]
            yield from (each for each in every if isinstance(each, torch.optim.Optimizer))


def _values_in(hook: Callable[..., Any]) -> Iterator[Any]:
    """Yields what a hook refers to: its closure, its arguments, its object, and globals."""
    function = getattr(hook, "func", hook)  # of a partial
    yield from (*getattr(hook, "args", ()), *(getattr(hook, "keywords", None) or {}).values())
    owner = getattr(function, "__self__", None)
    yield from (owner, *getattr(owner, "__dict__", {}).values())
    code = getattr(function, "__code__", None)
    if code is None:
        return
    known = function.__globals__
    yield from (known[name] for name in code.co_names if name in known)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty
            continue

"""Gradient checkpoints in the host's memory.

With checkpointing a layer keeps its input alone; for long rows those are what fills a GPU. torch's
checkpoint holds on to what it is given, so it is given a stand-in of the same shape that takes one
element, and the input is fetched from where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["offload_checkpoints"]


def offload_checkpoints(model: Any) -> Undo:
    """Lets `model`, a transformers model, keep its gradient checkpoints in the host's memory.

    It takes effect when checkpointing is switched on, as the Trainer does when it begins.

    Raises:
        InputError: the model has no gradient checkpointing.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"save_memory: {type(model).__name__} has no gradient checkpointing; leave out offload"
        )
    replaced: list[Undo] = []

    def switch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        replaced.extend(
            _replace(m) for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")
        )

    replaced.append(patch_method(model, "_set_gradient_checkpointing", switch))
    return lambda: undo_all(replaced)


def _replace(module: Any) -> Undo:
    before = module._gradient_checkpointing_func
    module._gradient_checkpointing_func = _checkpoint

    def undo() -> None:
        if module._gradient_checkpointing_func is _checkpoint:
            module._gradient_checkpointing_func = before

    return undo


def _checkpoint(run: Callable[..., Any], states: Tensor, *rest: Any) -> Any:
    kept = _Kept(states.detach())
    link: Tensor = _Link.apply(states)  # type: ignore[no-untyped-call]

    def from_kept(link: Tensor, *rest: Any) -> Any:
        return run(_Fetch.apply(link, kept), *rest)  # type: ignore[no-untyped-call]

    out = checkpoint(from_kept, link, *rest, use_reentrant=False)
    kept.offload()
    return out


class _Kept:
    """A layer's input, on its device while the layer runs and in the host's memory after it."""

    def __init__(self, states: Tensor) -> None:
        self._device = states.device
        self._states = states

    def offload(self) -> None:
        """Copies it away; on a GPU without waiting, into memory that it can reach by itself."""
        if self._device.type == "cpu":
            return
        room = torch.empty(self._states.shape, dtype=self._states.dtype, pin_memory=True)
        # The stream orders the copy before whatever takes the memory over.
        self._states = room.copy_(self._states, non_blocking=True)

    def fetch(self) -> Tensor:
        return self._states.to(self._device, non_blocking=True)


class _Link(torch.autograd.Function):
    """A stand-in for a tensor, of its shape and one element, that hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:  # noqa: ARG004
        return states.new_zeros(()).expand(states.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0]


class _Fetch(torch.autograd.Function):
    """What the stand-in stands for."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, kept: _Kept) -> Tensor:  # noqa: ARG004
        fetched = kept.fetch()
        return fetched.view_as(fetched)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None

"""Keeps gradient checkpoints in host memory.

With gradient checkpointing a layer stores only its input; on long rows these inputs fill the GPU.
torch's checkpoint keeps its arguments alive, so it gets a stand-in with the input's shape and the
storage of one element, and the layer fetches the real input from the host.
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
    """Makes `model`, a transformers model, keep its gradient checkpoints in host memory.

    Takes effect when checkpointing is enabled, which the Trainer does at the start of training.

    Raises:
        InputError: the model does not support gradient checkpointing.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"save_memory: {type(model).__name__} does not support gradient checkpointing; "
            "remove offload"
        )
    undos: list[Undo] = []

    def set_checkpointing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        undos.extend(
            _replace_checkpoint(module)
            for module in model.modules()
            if hasattr(module, "_gradient_checkpointing_func")
        )

    undos.append(patch_method(model, "_set_gradient_checkpointing", set_checkpointing))
    return lambda: undo_all(undos)


def _replace_checkpoint(module: Any) -> Undo:
    before = module._gradient_checkpointing_func
    module._gradient_checkpointing_func = _checkpoint

    def undo() -> None:
        if module._gradient_checkpointing_func is _checkpoint:
            module._gradient_checkpointing_func = before

    return undo


def _checkpoint(run: Callable[..., Any], states: Tensor, *rest: Any) -> Any:
    stored = _StoredInput(states.detach())
    stand_in: Tensor = _StandIn.apply(states)  # type: ignore[no-untyped-call]

    def run_on_stored(stand_in: Tensor, *rest: Any) -> Any:
        return run(_Fetch.apply(stand_in, stored), *rest)  # type: ignore[no-untyped-call]

    out = checkpoint(run_on_stored, stand_in, *rest, use_reentrant=False)
    stored.offload()
    return out


class _StoredInput:
    """A layer's input, on its device while the layer runs and in host memory afterwards."""

    def __init__(self, states: Tensor) -> None:
        self._device = states.device
        self._states = states

    def offload(self) -> None:
        """Copies the input from a GPU to pinned host memory, without waiting."""
        if self._device.type == "cpu":
            return
        buffer = torch.empty(self._states.shape, dtype=self._states.dtype, pin_memory=True)
        # The stream runs the copy before anything that reuses the GPU memory.
        self._states = buffer.copy_(self._states, non_blocking=True)

    def fetch(self) -> Tensor:
        return self._states.to(self._device, non_blocking=True)


class _StandIn(torch.autograd.Function):
    """Returns a tensor with the input's shape and one stored element, and passes gradients on."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:  # noqa: ARG004
        return states.new_zeros(()).expand(states.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0]


class _Fetch(torch.autograd.Function):
    """Replaces the stand-in by the stored input, and passes gradients on to the stand-in."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, stored: _StoredInput) -> Tensor:  # noqa: ARG004
        fetched = stored.fetch()
        return fetched.view_as(fetched)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None

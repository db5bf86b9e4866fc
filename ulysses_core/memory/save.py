"""`save_memory`: switches that reduce the memory a Trainer's model needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer

from ulysses_core.memory.checkpoints import offload_checkpoints
from ulysses_core.memory.loss import chunk_loss
from ulysses_core.memory.mlp import tile_mlps
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["MemoryHandle", "save_memory"]


class MemoryHandle:
    """The changes that `save_memory` made to a Trainer's model."""

    def __init__(self, undos: list[Undo]) -> None:
        self._undos = undos

    def restore(self) -> None:
        """Undoes the changes; a second call does nothing."""
        undo_all(self._undos)


def save_memory(
    trainer: Trainer,
    *,
    loss_chunk: int | None = None,
    mlp_chunk: int | None = None,
    offload: bool = False,
) -> MemoryHandle:
    """Reduces the memory that the model of `trainer` needs for long rows.

    Call it before ``train()``, and before or after `sequence_parallel`. With sequence parallelism
    a chunk is a part of this rank's slice.

    Args:
        trainer: a Trainer of a causal language model, with or without PEFT adapters.
        loss_chunk: tokens whose logits are computed at a time. Costs almost no time: logits are
            computed once, and only for tokens with a label.
        mlp_chunk: tokens that a dense MLP processes at a time. Costs one more forward pass of the
            MLPs, and under ZeRO-3 one gather of their weights per chunk.
        offload: keep the inputs of checkpointed layers in host memory. Needs the Trainer's
            ``gradient_checkpointing``; costs two copies of a layer's input over the bus.

    Returns:
        A handle whose `restore()` undoes the changes.

    Raises:
        InputError: a value is wrong, or the model or the Trainer does not support a switch.
    """
    for name, chunk in (("loss_chunk", loss_chunk), ("mlp_chunk", mlp_chunk)):
        if chunk is not None and chunk < 1:
            raise InputError(f"save_memory: {name} is {chunk}; expected an integer of 1 or more")
    if offload and not trainer.args.gradient_checkpointing:
        raise InputError(
            "save_memory: offload is true but gradient_checkpointing is false; "
            "set gradient_checkpointing to true, or remove offload"
        )
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    undos: list[Undo] = []
    try:
        if loss_chunk is not None:
            undos += _chunk_loss(trainer, model, loss_chunk)
        if mlp_chunk is not None:
            undos.append(tile_mlps(model, mlp_chunk))
        if offload:
            undos.append(offload_checkpoints(model))
    except InputError:
        undo_all(undos)
        raise
    return MemoryHandle(undos)


def _chunk_loss(trainer: Trainer, model: Any, chunk: int) -> list[Undo]:
    """Chunks the loss, except in evaluations and predictions whose logits the Trainer needs."""
    is_loss_only = False

    def prediction_step(
        original: Callable[..., Any],
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        nonlocal is_loss_only
        is_loss_only = prediction_loss_only
        try:
            return original(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            is_loss_only = False

    undo = chunk_loss(model, chunk, lambda: not is_loss_only)
    return [undo, patch_method(trainer, "prediction_step", prediction_step)]

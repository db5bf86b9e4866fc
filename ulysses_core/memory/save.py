"""`save_memory`: what can be switched on for the model of a Trainer."""

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
    """What `save_memory` did to a Trainer's model."""

    def __init__(self, undos: list[Undo]) -> None:
        self._undos = undos

    def restore(self) -> None:
        """Puts the model back as it was."""
        undo_all(self._undos)


def save_memory(
    trainer: Trainer,
    *,
    loss_chunk: int | None = None,
    mlp_chunk: int | None = None,
    offload: bool = False,
) -> MemoryHandle:
    """Makes the model of `trainer` need less memory for long rows; call it before ``train()``.

    Goes with `sequence_parallel` in either order; a chunk is then of this rank's slice.

    Args:
        trainer: a Trainer of a causal language model, with or without PEFT adapters.
        loss_chunk: tokens whose logits are there at a time. Costs no time to speak of: logits are
            made once, and only for tokens that have a label.
        mlp_chunk: tokens that a dense MLP works on at a time. Costs one more forward pass of the
            MLPs, and under ZeRO-3 one gathering of their weights a chunk.
        offload: keeps the inputs of checkpointed layers in the host's memory. Needs the Trainer's
            ``gradient_checkpointing``; costs two copies of a layer's input over the bus.

    Returns:
        A handle whose `restore()` undoes it.

    Raises:
        InputError: a value is wrong, or the model or the Trainer cannot do it.
    """
    for name, chunk in (("loss_chunk", loss_chunk), ("mlp_chunk", mlp_chunk)):
        if chunk is not None and chunk < 1:
            raise InputError(f"save_memory: {name} is {chunk}; allowed is 1 or more")
    if offload and not trainer.args.gradient_checkpointing:
        raise InputError(
            "save_memory: offload keeps checkpoints, and there are none; set "
            "gradient_checkpointing to true"
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
    """Chunks, but in predictions and evaluations of which the Trainer wants logits."""
    loss_only = False

    def prediction_step(
        original: Callable[..., Any], model: Any, inputs: Any, only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal loss_only
        loss_only = only
        try:
            return original(model, inputs, only, *args, **kwargs)
        finally:
            loss_only = False

    undo = chunk_loss(model, chunk, lambda: not loss_only)
    return [undo, patch_method(trainer, "prediction_step", prediction_step)]

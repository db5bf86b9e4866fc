"""What a callback must find out about the Trainer that calls it; transformers does not say."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import broadcast_bytes, rank
from ulysses_monitor.engines import Engine, find_engine

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

__all__ = [
    "calling_trainer",
    "engine_of",
    "find_obstacle",
    "read_on_rank_0",
    "resumed_checkpoint",
]

logger = logging.getLogger(__name__)


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """Returns the Trainer that is calling `callback`; transformers does not pass it.

    Raises:
        InputError: no caller is a Trainer that has this callback.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise InputError("monitor: MonitorCallback was called by something that is not a Trainer")


def resumed_checkpoint(trainer: Trainer) -> Path:
    """Returns the checkpoint that the Trainer resumes from; only its own methods know it."""
    frame = sys._getframe(1)
    while frame is not None:
        given = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(given, str | os.PathLike):
            return Path(given)
        frame = frame.f_back  # type: ignore[assignment]
    step = trainer.state.global_step
    return Path(trainer._get_output_dir(trial=None)) / f"checkpoint-{step}"


def read_on_rank_0(path: Path, engine: Engine) -> bytes | None:
    """Reads a checkpoint's file on rank 0, whose file system has it; None if there is none."""
    held = b""
    if rank() == 0:
        try:
            held = path.read_bytes()
        except OSError as error:
            logger.debug("monitor: %s: %s", path, error)
    return broadcast_bytes(held, engine.device) or None


def engine_of(trainer: Trainer) -> Engine:
    """Returns the engine view of what `trainer` trains."""
    return find_engine(
        trainer.model_wrapped,
        trainer.optimizer,
        scaler=trainer.accelerator.scaler,
        clip_norm=lambda: float(trainer.args.max_grad_norm or math.inf),
    )


def find_obstacle(trainer: Trainer) -> str:
    """Returns why no step of the training can be computed again; empty if nothing is known."""
    if getattr(trainer.args, "torch_compile", False):
        return "torch.compile"
    sizes = (getattr(trainer, f"get_{kind}_size", lambda: 1) for kind in ("cp", "tp", "sp"))
    if any(size() > 1 for size in sizes):
        return "ranks that share rows (sequence, context or tensor parallelism)"
    return ""

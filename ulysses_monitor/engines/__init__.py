"""Engine views: gradients, parameters and optimizer state of each training engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.base import Engine, Replica, Shard, StepCallback, do_nothing
from ulysses_monitor.engines.ddp import DDPEngine, is_ddp
from ulysses_monitor.engines.deepspeed import find_deepspeed_engine
from ulysses_monitor.engines.fsdp import FSDPEngine, is_fsdp, refuse_fsdp1
from ulysses_monitor.engines.in_backward import refuse_updates_in_backward
from ulysses_monitor.engines.plain import PlainEngine
from ulysses_monitor.engines.support import refuse_lbfgs, unwrap

__all__ = [
    "DDPEngine",
    "Engine",
    "FSDPEngine",
    "PlainEngine",
    "Replica",
    "Shard",
    "StepCallback",
    "do_nothing",
    "find_engine",
]


def find_engine(
    model: nn.Module,
    optimizer: Any,
    *,
    scaler: Any = None,
    clip_norm: Callable[[], float | None] | None = None,
) -> Engine:
    """Returns the view of the engine that trains `model`.

    Args:
        model: a module, a DDP or FSDP2 module, compiled or not, or a DeepSpeed engine.
        optimizer: the optimizer, or accelerate's wrapper of it; ignored for a DeepSpeed engine,
            which has its own.
        scaler: the `torch.amp.GradScaler`, if any; accelerate's wrapper has its own.
        clip_norm: returns the norm that the caller will clip to; ignored for a DeepSpeed engine,
            which knows it.

    Raises:
        InputError: the engine or the optimizer is not supported.
    """
    if (engine := find_deepspeed_engine(model)) is not None:
        return engine
    if optimizer is None:
        raise InputError(
            "monitor: the optimizer is None; expected the torch.optim.Optimizer that trains the "
            "model"
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        optimizer = inner  # accelerate's wrapper
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"monitor: the optimizer is a {type(optimizer).__name__}; "
            "expected a torch.optim.Optimizer"
        )
    refuse_lbfgs(optimizer)
    refuse_updates_in_backward(unwrap(model), optimizer)
    refuse_fsdp1(model)
    view = FSDPEngine if is_fsdp(unwrap(model)) else DDPEngine if is_ddp(model) else PlainEngine
    return view(model, optimizer, scaler=scaler, clip_norm=clip_norm)

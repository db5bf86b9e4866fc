"""Engine views: how to read gradients, parameters and optimizer state of each training engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_monitor.engines.base import Engine, Shard
from ulysses_monitor.engines.deepspeed import DeepSpeedEngine, is_deepspeed_engine
from ulysses_monitor.engines.plain import PlainEngine
from ulysses_monitor.errors import InputError

__all__ = ["DeepSpeedEngine", "Engine", "PlainEngine", "Shard", "find_engine"]


def find_engine(model: nn.Module, optimizer: torch.optim.Optimizer | None, **plain: Any) -> Engine:
    """Finds the engine behind `model`.

    Args:
        model: a module, a DDP module, or a DeepSpeed engine.
        optimizer: the optimizer; a DeepSpeed engine brings its own.
        **plain: passed to `PlainEngine`.

    Raises:
        InputError: the engine is not supported.
    """
    if is_deepspeed_engine(model):
        return DeepSpeedEngine(model)
    if optimizer is None:
        raise InputError("monitor: watch(model, optimizer) needs the optimizer that trains model")
    return PlainEngine(model, optimizer, **plain)

"""Checkpoints of DeepSpeed are read as data: no code of a checkpoint ever runs.

A pickle may call any function when it is read. torch reads only tensors and plain containers with
``weights_only=True``, which DeepSpeed turns off for its own files. Here it is on, for the engines
of one Trainer, with a list of the few types of DeepSpeed's that its checkpoints hold.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from typing import Any

import torch

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["ALLOWED", "load_checkpoints_safely", "safe_load"]

ALLOWED = (
    "argparse.Namespace",
    "collections.OrderedDict",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Types that a DeepSpeed checkpoint may hold beside tensors and plain containers."""


def load_checkpoints_safely(trainer: Any) -> Undo:
    """Makes every DeepSpeed engine that `trainer` prepares read its checkpoints by `safe_load`.

    Returns:
        What puts the Trainer and those engines back.
    """
    undos: list[Undo] = []

    def prepare(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = original(*args, **kwargs)
        for each in prepared if isinstance(prepared, tuple | list) else (prepared,):
            engine = getattr(each, "checkpoint_engine", None)
            if engine is not None:
                undos.append(patch_method(engine, "load", _load))
        return prepared

    undos.append(patch_method(trainer.accelerator, "_prepare_deepspeed", prepare))
    return lambda: undo_all(undos)


def _load(_: Callable[..., Any], path: str, map_location: Any = None) -> Any:
    return safe_load(path, map_location)


def safe_load(path: str, map_location: Any = None) -> Any:
    """What a file of a DeepSpeed checkpoint holds.

    Raises:
        InputError: it holds a type that is not in `ALLOWED`.
    """
    types = [getattr(importlib.import_module(m), n) for m, _, n in map(_split, ALLOWED)]
    try:
        with torch.serialization.safe_globals(types):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {path}: holds what is no tensor or known setting, so it is not read; "
            f"torch says: {str(error).splitlines()[0]}"
        ) from error


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")

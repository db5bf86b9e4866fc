"""The only module here that knows DeepSpeed: its environment, its start and its checkpoints.

A pickle can call any function when it is loaded. With ``weights_only=True`` torch loads only
tensors and plain containers, but DeepSpeed turns that off for its own files. This module turns it
on for the engines of a Trainer and allows the few types that DeepSpeed's checkpoints contain, so no
code of a checkpoint ever runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import pkgutil
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.common.ranks import agree_or_raise, broadcast_bytes, rank
from ulysses_monitor.common.validation import validate

__all__ = [
    "ALLOWED",
    "build_alike",
    "check_settings",
    "load_checkpoints_safely",
    "prepare_environment",
    "safe_load",
    "start_deepspeed",
]

logger = logging.getLogger(__name__)

ALLOWED = (
    "argparse.Namespace",
    "collections.OrderedDict",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Types that a DeepSpeed checkpoint may contain besides tensors and plain containers."""


def prepare_environment(*, uses_deepspeed: bool) -> None:
    """Sets the variables that DeepSpeed reads; call it before transformers is imported.

    Args:
        uses_deepspeed: whether this process trains with DeepSpeed, which does not start unless the
            variables of a launcher describe the process.
    """
    if not torch.accelerator.is_available():
        # Otherwise DeepSpeed may mistake a compiler on the machine for a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if uses_deepspeed and "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks DeepSpeed's ``zero_optimization``, which it reads only after the model is loaded.

    Raises:
        InputError: a key is unknown, or a value is wrong.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise InputError(f"deepspeed: zero_optimization is {zero!r}; expected a mapping")
    known = {key: value for key, value in zero.items() if value != "auto"}
    validate(DeepSpeedZeroConfig, known, "deepspeed: zero_optimization")


def start_deepspeed() -> None:
    """Starts DeepSpeed on torch's process group; what it prints while compiling goes to the log."""
    import deepspeed

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    logger.debug("deepspeed: %s", printed.getvalue().strip())


def build_alike(build: Callable[[], Any], device: torch.device) -> Any:
    """Builds a model whose random weights do not depend on DeepSpeed's stage.

    ZeRO-3 makes a model in shards and draws its weights in another order than one process does. So
    rank 0 first builds a whole model in its host memory, and the shards of all ranks are filled
    from that, a parameter at a time. The numbers that are drawn afterwards are the same too.

    Args:
        build: builds the model with transformers; it draws from torch's random numbers.
        device: where tensors are that the process group communicates.

    Returns:
        The model, in shards under ZeRO-3.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return build()
    whole = _build_on_rank_0(build, device)
    state = broadcast_bytes(torch.get_rng_state().numpy().tobytes(), device)
    model = build()
    _fill(model, whole, device)
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return model


def _build_on_rank_0(build: Callable[[], Any], device: torch.device) -> Any:
    """Builds a model as on one process; None on the other ranks.

    Raises:
        Exception: what `build` raises; on each rank, so that none waits for another.
    """
    model, error = None, None
    if rank() == 0:
        try:
            with _without_zero3():
                model = build()
        except Exception as e:  # noqa: BLE001 - raised below, where no rank waits for another
            error = e
    agree_or_raise(error, ValueError("rank 0 could not build it; see its message"), device)
    return model


@contextlib.contextmanager
def _without_zero3() -> Iterator[None]:
    """Lets transformers build a model as if there were no DeepSpeed."""
    from transformers.integrations import deepspeed as state

    active = state._hf_deepspeed_config_weak_ref
    state.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        state._hf_deepspeed_config_weak_ref = active


def _fill(model: Any, whole: Any, device: torch.device) -> None:
    """Copies parameters and buffers of rank 0's `whole` model to each rank's shards."""
    from deepspeed.runtime.zero import GatheredParameters

    held = (
        {} if whole is None else {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    )
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if name in held:
                parameter.copy_(held.pop(name))
    for name, buffer in model.named_buffers():
        value = held.get(name, buffer)
        value = value.to(device, buffer.dtype)
        dist.broadcast(value, src=0)
        buffer.copy_(value)


def load_checkpoints_safely(trainer: Any) -> Undo:
    """Makes every DeepSpeed engine that `trainer` prepares load checkpoints with `safe_load`.

    Returns:
        A function that restores the Trainer and those engines.
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
    """Reads a file of a DeepSpeed checkpoint.

    Raises:
        InputError: the file contains a type that is not in `ALLOWED`.
    """
    types = [pkgutil.resolve_name(name) for name in ALLOWED]
    try:
        with torch.serialization.safe_globals(types):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        content = unknown[1] if unknown else "unknown data"
        raise InputError(
            f"checkpoint {path}: it contains {content}, which could run code; expected tensors "
            "and the settings of DeepSpeed, so use another checkpoint"
        ) from error

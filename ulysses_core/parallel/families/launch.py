"""Trains small models in processes of their own, one or several that share rows."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ulysses_core.parallel.families.proof import Variant, train_variant
from ulysses_monitor.common.errors import UlyssesError

__all__ = ["train_apart"]


def train_apart(variants: Sequence[Variant], size: int) -> list[dict[str, Any]]:
    """Trains each variant in `size` new processes.

    Returns:
        For each variant what `train_variant` returns on the first rank, or `error`.

    Raises:
        UlyssesError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, variants, size, folder) for rank in range(size)]
        processes = [context.Process(target=_run_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise UlyssesError("a process that tried the model died; see its output above")
        found: list[dict[str, Any]] = torch.load(Path(folder, "found.pt"), weights_only=True)
    return found


def _run_rank(rank: int, variants: Sequence[Variant], size: int, folder: str) -> None:
    """The life of one process."""
    torch.set_num_threads(1)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    found = [_train(variant, size) for variant in variants]
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    if size > 1:
        dist.destroy_process_group()


def _train(variant: Variant, size: int) -> dict[str, Any]:
    try:
        return train_variant(variant, size)
    except Exception as error:  # noqa: BLE001 - the families' code fails in many ways
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}

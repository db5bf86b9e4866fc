"""Which rank this is, and how ranks agree; works the same where nothing is distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["agree_or_raise", "rank", "world_size"]


def rank() -> int:
    """This process's rank, 0 where nothing is distributed."""
    return dist.get_rank() if _distributed() else 0


def world_size() -> int:
    """Number of processes, 1 where nothing is distributed."""
    return dist.get_world_size() if _distributed() else 1


def agree_or_raise(error: Exception | None, otherwise: Exception, device: torch.device) -> None:
    """Raises on every rank where any rank has an `error`, so that none waits for the others.

    Args:
        error: this rank's error, if any; raised as it is.
        otherwise: what the other ranks raise.
        device: where the backend's tensors live.
    """
    failed = torch.tensor([float(error is not None)], device=device)
    if world_size() > 1:
        dist.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item():
        raise otherwise


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()

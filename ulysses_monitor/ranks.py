"""Which rank this is, and how ranks agree; works the same where nothing is distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["agree_or_raise", "any_rank", "rank", "world_size"]


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
    failed = any_rank(error is not None, device)
    if error is not None:
        raise error
    if failed:
        raise otherwise


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank; every rank must call it."""
    flags = torch.tensor([float(flag)], device=device)
    if world_size() > 1:
        dist.all_reduce(flags)
    return bool(flags.item())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()

"""Tells which rank this is and lets ranks agree; also works in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["agree_or_raise", "any_rank", "broadcast_bytes", "rank", "world_size"]


def rank() -> int:
    """Returns the rank of this process, 0 if nothing is distributed."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes, 1 if nothing is distributed."""
    return dist.get_world_size() if _is_distributed() else 1


def agree_or_raise(error: Exception | None, otherwise: Exception, device: torch.device) -> None:
    """Raises on every rank if any rank has an error, so that no rank waits for the others.

    Args:
        error: this rank's error, if any; raised unchanged.
        otherwise: what the other ranks raise.
        device: device of the tensors that the backend communicates.
    """
    failed = any_rank(error is not None, device)
    if error is not None:
        raise error
    if failed:
        raise otherwise


def any_rank(flag: bool, device: torch.device) -> bool:
    """Returns whether `flag` is true on any rank; every rank must call it."""
    flags = torch.tensor([float(flag)], device=device)
    if world_size() > 1:
        dist.all_reduce(flags)
    return bool(flags.item())


def broadcast_bytes(data: bytes, device: torch.device) -> bytes:
    """Returns the `data` of rank 0 on every rank; every rank must call it."""
    if world_size() == 1:
        return data
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, src=0)
    # frombuffer needs writable memory.
    payload = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)
    if rank() != 0:
        payload = torch.zeros(max(1, int(size)), dtype=torch.uint8)
    payload = payload.to(device)
    dist.broadcast(payload, src=0)
    return payload.cpu().numpy().tobytes()[: int(size)]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()

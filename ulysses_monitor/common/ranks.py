"""Tells which rank this is and lets ranks agree; also works in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["agree_or_raise", "any_rank", "broadcast_bytes", "gather_bytes", "rank", "world_size"]


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


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """Returns the `data` of every rank on every rank; every rank must call it."""
    if world_size() == 1:
        return [data]
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = len(data)
    dist.all_reduce(sizes)
    longest = max(1, int(sizes.max()))
    # frombuffer needs writable memory.
    own = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return [
        part.cpu().numpy().tobytes()[:size]
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()

"""How much memory this process and its device use, in bytes; reading it does not synchronise."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

__all__ = ["DeviceMemory", "host_bytes", "host_peak_bytes", "read_device"]

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of ``ru_maxrss``."""

DeviceMemory = tuple[float, float, float]
"""Allocated and reserved by torch now, and the largest allocation so far."""


def host_bytes(process: psutil.Process) -> float:
    """Returns the resident memory of a process."""
    return float(process.memory_info().rss)


def host_peak_bytes() -> float:
    """Returns the largest resident memory of this process so far."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT)


def read_device(device: torch.device) -> DeviceMemory:
    """Returns what torch's allocator holds on a CUDA device."""
    # The nested form in one call: memory_allocated() and its like flatten all statistics each time.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    if not stats:  # CUDA has not been used yet
        return 0.0, 0.0, 0.0
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    return float(allocated["current"]), float(reserved["current"]), float(allocated["peak"])

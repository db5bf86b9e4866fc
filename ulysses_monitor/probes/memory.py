"""Memory of the host and the device: the largest over ranks.

Legend: R ranks, M metrics.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from ulysses_monitor.common.memory import host_bytes, host_peak_bytes, read_device
from ulysses_monitor.common.ranks import rank, world_size
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.records import Cost

__all__ = ["MemoryProbe"]

_HOST = ("system/host_memory_bytes/total", "system/host_memory_peak_bytes/total")
_DEVICE = (
    "system/device_memory_allocated_bytes/total",
    "system/device_memory_reserved_bytes/total",
    "system/device_memory_peak_bytes/total",
)


class MemoryProbe:
    """Reads this process's memory, and on CUDA the allocator's, before each optimizer step.

    A sum over ranks cannot give a maximum, so each rank has a row of its own in the vector.

    Args:
        device: the device of the training, of the same kind on all ranks.
    """

    name = "memory"
    cost: Cost = "every"
    maxima = 0
    rechecks = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self.names = (*_HOST, *(_DEVICE if device.type == "cuda" else ()))
        self._ranks, self._rank = world_size(), rank()
        self.size = self._ranks * len(self.names)

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002 - the protocol fixes the signature
        """Returns zeros with this rank's row filled in, [R * M]."""
        row = [host_bytes(self._process), host_peak_bytes()]
        if self._device.type == "cuda":
            row += read_device(self._device)
        before, after = self._rank * len(row), self.size - (self._rank + 1) * len(row)
        return torch.tensor([0.0] * before + row + [0.0] * after, dtype=torch.float64)

    def values(self, totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns the largest value over ranks of each metric [M]."""
        largest: npt.NDArray[np.float64] = totals.reshape(self._ranks, -1).max(axis=0)
        return largest

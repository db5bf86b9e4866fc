"""What people send to a run: read by rank 0, told to all ranks at the same step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ulysses_monitor.common.ranks import broadcast_bytes
from ulysses_monitor.records.command import Command
from ulysses_monitor.store.control_file import ControlFile

__all__ = ["Orders"]

_PENDING = "steering/orders"


class Orders:
    """The commands of `ulysses control`, one a step.

    Args:
        device: where the backend's tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._file: ControlFile | None = None
        self._pending: Command | None = None

    def open(self, run_dir: Path) -> None:
        """Looks into the run directory from now on; rank 0 alone."""
        self._file = ControlFile(run_dir)

    def problems(self) -> list[str]:
        """What was there and is not obeyed."""
        return [] if self._file is None else self._file.problems()

    def sends(self) -> dict[str, float]:
        """Whether there is one, to be summed over ranks."""
        if self._file is not None and self._pending is None:
            self._pending = self._file.poll()
        return {_PENDING: float(self._pending is not None)}

    def receive(self, sums: Mapping[str, float]) -> Command | None:
        """The command of this step, alike on all ranks."""
        if not sums[_PENDING]:
            return None
        own = b"" if self._pending is None else self._pending.to_json().encode()
        self._pending = None
        return Command.from_json(broadcast_bytes(own, self._device).decode())

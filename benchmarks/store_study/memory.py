"""The resident memory of this process, in bytes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["read_peak", "read_resident", "reset_peak"]


def reset_peak() -> float:
    """Begins to count the peak from now on, and returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_peak()


def read_peak() -> float:
    """Returns the most that was resident; getrusage would count the parent's too."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * float(status.split("VmHWM:")[1].split()[0])


def read_resident() -> float:
    """Returns what is resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))

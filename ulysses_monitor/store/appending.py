"""A file that only grows and stays intact when the disk is full or the process is killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["AppendFile"]

_SYNC_SECONDS = 0.5
"""Pause between two syncs. Because the bus flushes more often, a step is safe within a second."""


class AppendFile:
    """Appends bytes to a file.

    Bytes that could not be written stay in memory, and the next `flush` writes them at the same
    place, so an error never leaves a gap. A forked child has no buffer that it could write again.

    Args:
        path: the file; created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size
        self._pending = bytearray()
        self._synced_end, self._synced = self._end, time.monotonic()

    def write(self, data: bytes | memoryview) -> int:
        """Takes `data`, which reaches the file with the next `flush`."""
        self._pending += data
        return len(data)

    def flush(self) -> None:
        """Hands all data to the operating system, and syncs the disk at most twice a second.

        Raises:
            OSError: the data could not be written; it is kept for the next call.
        """
        while self._pending:
            with memoryview(self._pending) as data:
                count = os.pwrite(self._file, data, self._end)
            self._end += count
            del self._pending[:count]
        if self._end != self._synced_end and time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Waits until the disk has what the operating system got."""
        self._synced = time.monotonic()
        os.fdatasync(self._file)
        self._synced_end = self._end

    def close(self) -> None:
        """Writes the rest and closes the file, even if writing fails."""
        try:
            self.flush()
            self.sync()
        finally:
            os.close(self._file)

"""A file that only grows, and that a full disk or a killed process leaves whole up to some byte."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["AppendFile"]

_SYNC_SECONDS = 0.5
"""Between two waits for the disk: with the bus flushing each half second, a step is safe in one."""


class AppendFile:
    """Bytes at the end of a file.

    What could not be written stays in memory and is written at the same place by the next `flush`,
    so an error in between tears nothing. Nothing is buffered in a way that a forked child could
    write once more.

    Args:
        path: the file; made if missing, continued if not.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size
        self._pending = bytearray()
        self._synced_end, self._synced = self._end, time.monotonic()

    def write(self, data: bytes | memoryview) -> int:
        """Takes `data`; nothing reaches the file before `flush`."""
        self._pending += data
        return len(data)

    def flush(self) -> None:
        """Hands everything to the operating system, and at most twice a second to the disk.

        Raises:
            OSError: it could not be written; it is kept for the next time.
        """
        while self._pending:
            with memoryview(self._pending) as data:
                count = os.pwrite(self._file, data, self._end)
            self._end += count
            del self._pending[:count]
        if self._end != self._synced_end and time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Waits until the disk has what the operating system was given."""
        self._synced = time.monotonic()
        os.fdatasync(self._file)
        self._synced_end = self._end

    def close(self) -> None:
        """Writes out the rest and closes the file; closed also where that fails."""
        try:
            self.flush()
            self.sync()
        finally:
            os.close(self._file)

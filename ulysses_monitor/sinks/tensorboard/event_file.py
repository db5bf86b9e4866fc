"""One TensorBoard event file, written without a thread and without a buffer of its own."""

from __future__ import annotations

import io
import itertools
import os
import socket
import struct
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from ulysses_monitor.common.tfrecord import masked_crc32c

__all__ = ["EventFile", "restart"]

_count = itertools.count()


class EventFile:
    """Appends events; each is with the operating system when `append` returns.

    Nothing waits in the process: a kill loses no event, and a forked child inherits none to write
    a second time.

    Args:
        directory: made if it is not there. TensorBoard reads its files in the order of their
            names, which begin with the time.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"
        self._file: io.FileIO = (directory / f"events.out.tfevents.{stamp}").open("xb", buffering=0)
        self._size = 0
        self.append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def append(self, *events: Event) -> None:
        """Writes events, all of them or none.

        Raises:
            OSError: they could not be written; the file is as before, and can be tried again.
        """
        frame = b"".join(map(_framed, events))
        try:
            if self._file.write(frame) != len(frame):
                raise OSError(f"{self._file.name}: no space left for {len(frame)} bytes")
        except OSError:
            # Half a record would hide from readers all that follow it.
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(frame)

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        self._file.close()


def restart(step: int, wall_time: float) -> Event:
    """Marks where a training begins or begins again: readers drop `step` and all later ones.

    They take the first mark of a folder for a beginning, so a fresh training needs one too.
    """
    start = SessionLog(status=SessionLog.START)
    return Event(wall_time=wall_time, step=step, session_log=start)


def _framed(event: Event) -> bytes:
    """An event as a TFRecord: its length, a checksum of that, its bytes, a checksum of those."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)

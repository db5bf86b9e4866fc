"""Writes a TensorBoard event file, without a thread and without a buffer of its own."""

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
    """Appends events, which the operating system has when `append` returns.

    Nothing waits in the process, so killing it loses no event, and a forked child has no buffer
    that it could write again.

    Args:
        directory: the folder; created if it does not exist. TensorBoard reads the files in it in
            the order of their names, which begin with the time.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"
        self._file: io.FileIO = (directory / f"events.out.tfevents.{stamp}").open("xb", buffering=0)
        self._size = 0
        self.append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def append(self, *events: Event) -> None:
        """Writes all events or none.

        Raises:
            OSError: the events could not be written; the file is unchanged, so a retry is safe.
        """
        frame = b"".join(map(_frame, events))
        try:
            if self._file.write(frame) != len(frame):
                raise OSError(f"{self._file.name}: no space left for {len(frame)} bytes")
        except OSError:
            # An incomplete record would hide all later ones from readers.
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(frame)

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        self._file.close()


def restart(step: int, wall_time: float) -> Event:
    """Returns the mark of a start: readers drop what they have of `step` and later steps.

    Readers take the first mark in a folder for its beginning, so a new training needs one too.
    """
    start = SessionLog(status=SessionLog.START)
    return Event(wall_time=wall_time, step=step, session_log=start)


def _frame(event: Event) -> bytes:
    """Returns a TFRecord: length of the event, checksum of the length, event, its checksum."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)

"""The bounded queues of the sinks: one drops its oldest items, the other spills to disk."""

from __future__ import annotations

import errno
import os
from collections import deque
from contextlib import AbstractContextManager
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Event, StepRecord

__all__ = ["Entry", "Item", "LosslessQueue", "Queue"]

Item = StepRecord | Event

_OVERHEAD = 512
"""Approximate bytes of an item besides its values."""


def _size(item: Item) -> int:
    return _OVERHEAD + (item.values.nbytes if isinstance(item, StepRecord) else 0)


class Entry:
    """A queued item, in memory or with its values on disk."""

    __slots__ = ("_item", "_offset", "_schema", "_spill", "_step", "_time")

    def __init__(self, item: Item) -> None:
        self._item: Item | None = item

    def item(self) -> Item:
        """Returns the item, reading its values from disk if they are there."""
        item = self._item
        if item is None:
            values = self._spill.read(self._offset, len(self._schema.names))
            item = StepRecord(self._step, self._time, self._schema, values)
        return item

    def move_to_disk(self, spill: Spill) -> None:
        """Moves the values to disk; `item` may be called at the same time.

        Raises:
            OSError: there is no room; the item stays in memory.
        """
        item = self._item
        if isinstance(item, StepRecord):
            self._spill, self._offset = spill, spill.write(item.values)
            self._schema, self._step, self._time = item.schema, item.step, item.time
            self._item = None


class Spill:
    """Stores values in a temporary file without a name, so that nothing is ever left behind.

    Args:
        limit: most bytes in the file.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._end = limit, 0
        self._file: IO[bytes] = TemporaryFile(prefix="ulysses-spill-")  # noqa: SIM115

    def write(self, values: npt.NDArray[np.float64]) -> int:
        """Appends values and returns their offset in bytes.

        Raises:
            OSError: there is no room.
        """
        if self._end + values.nbytes > self._limit:
            raise OSError(errno.ENOSPC, "the spill file is full")
        offset, data = self._end, np.ascontiguousarray(values).view(np.uint8).data
        while data:
            count = os.pwrite(self._file.fileno(), data, self._end)
            data, self._end = data[count:], self._end + count
        return offset

    def read(self, offset: int, count: int) -> npt.NDArray[np.float64]:
        """Returns the `count` values written at `offset`."""
        return np.frombuffer(os.pread(self._file.fileno(), 8 * count, offset), np.float64)


class Queue:
    """First in, first out; a full queue drops its oldest items.

    Args:
        limit: most bytes in the queue.

    Attributes:
        dropped: number of dropped items.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._entries: deque[Entry] = deque()
        self._in_hand: Entry | None = None
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries) + (self._in_hand is not None)

    def put(self, item: Item) -> None:
        """Adds an item in constant time."""
        self._entries.append(Entry(item))
        self._bytes += _size(item)
        while self._bytes > self._limit and len(self._entries) > 1:
            self._take()
            self.dropped += 1

    def first(self) -> Entry:
        """Returns the oldest entry, which stays in the queue and can no longer be dropped."""
        if self._in_hand is None:
            self._in_hand = self._take()
        return self._in_hand

    def remove_first(self) -> None:
        """Removes the entry that `first` returned."""
        self._in_hand = None

    def _take(self) -> Entry:
        entry = self._entries.popleft()
        self._bytes -= _size(entry.item())
        return entry


class LosslessQueue:
    """First in, first out; `spill` moves what does not fit in memory to disk.

    The queue drops the newest record only if the disk is also full or too slow.

    Args:
        limit: most bytes in memory; four times as many while they wait to be moved to disk.
        spill_limit: most bytes on disk.

    Attributes:
        dropped: number of dropped records.
    """

    def __init__(self, limit: int, spill_limit: int) -> None:
        self._limit, self._spill_limit = limit, spill_limit
        self._bytes = 0
        self._entries: deque[Entry] = deque()
        self._in_memory: deque[tuple[Entry, int]] = deque()
        self._spill: Spill | None = None
        self._cannot_spill = False
        self._moving: Entry | None = None
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, item: Item) -> None:
        """Adds an item in constant time."""
        size = _size(item)
        if isinstance(item, StepRecord) and self._bytes + size > 4 * self._limit:
            self.dropped += 1
            return
        entry = Entry(item)
        self._entries.append(entry)
        self._in_memory.append((entry, size))
        self._bytes += size

    def first(self) -> Entry:
        """Returns the oldest entry, which stays in the queue."""
        return self._entries[0]

    def remove_first(self) -> None:
        """Removes the entry that `first` returned."""
        entry = self._entries.popleft()
        if entry is self._moving:
            self._moving = None
        if self._in_memory and self._in_memory[0][0] is entry:
            self._bytes -= self._in_memory.popleft()[1]
        if not self._entries:
            self._spill, self._cannot_spill = None, False

    def spill(self, lock: AbstractContextManager[object]) -> None:
        """Moves the oldest records to disk until memory is within its limit.

        Args:
            lock: guards all other methods; not held while writing to disk.
        """
        while True:
            with lock:
                if self._bytes <= self._limit or self._cannot_spill:
                    return
                entry, size = self._in_memory.popleft()
                self._bytes -= size
                self._moving = entry
            try:
                spill = self._spill = self._spill or Spill(self._spill_limit)
                entry.move_to_disk(spill)
            except OSError:  # the disk is full, or there is no temporary folder
                with lock:
                    self._cannot_spill = True
                    if self._moving is entry:  # it was not removed in the meantime
                        self._bytes += size
                        self._in_memory.appendleft((entry, size))

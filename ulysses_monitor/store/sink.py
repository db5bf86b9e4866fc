"""The run store as a sink: metrics go to columnar parts, events to events.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from weakref import WeakKeyDictionary

from ulysses_monitor.common.files import sync_directory
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates, event_to_dict
from ulysses_monitor.store.appending import AppendFile
from ulysses_monitor.store.compaction import compact, is_small
from ulysses_monitor.store.directory import RunDirectory
from ulysses_monitor.store.location import Location
from ulysses_monitor.store.part import write_part
from ulysses_monitor.store.reading import list_files
from ulysses_monitor.store.tail import Tail, read_tail

__all__ = ["StoreSink"]

_PART_BYTES = 32 << 20
_PART_ROWS = 64, 4096
"""Fewest and most steps of a part."""

_OPEN_TAILS = 32


class StoreSink:
    """Writes ``metrics/`` and ``events.jsonl`` of a run directory; loses nothing.

    Args:
        directory: the run directory, locked for writing.
        part_rows: steps of a part; by default, as many as fit in 32 MiB.
    """

    name = "store"
    lossless = True

    def __init__(self, directory: RunDirectory, part_rows: int | None = None) -> None:
        self._part_rows = part_rows
        self._directory = directory.metrics
        for leftover in self._directory.glob(".*.tmp"):  # from a killed writer
            leftover.unlink(missing_ok=True)
        self._number = 1 + max(
            (f.number for f in list_files(Location.of(self._directory))), default=-1
        )
        self._tails: dict[tuple[str, ...], Tail] = {}
        self._tail_of_schema: WeakKeyDictionary[Schema, Tail] = WeakKeyDictionary()
        self._events = _open_events(directory.path / "events.jsonl")

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event):
            line = json.dumps(event_to_dict(item), ensure_ascii=False, default=str) + "\n"
            self._events.write(escape_surrogates(line).encode())
        else:
            self._tail_for(item.schema).write(item)

    def _tail_for(self, schema: Schema) -> Tail:
        """Returns the tail for the schema's names, with room for one more step."""
        tail = self._tail_of_schema.get(schema) or self._tails.get(schema.names)
        limit = self._part_rows or _rows_of_a_part(len(schema.names))
        if tail is not None and tail.rows >= limit:
            self._seal(tail)
            tail = None
        if tail is None:
            if len(self._tails) >= _OPEN_TAILS:
                self._seal(next(iter(self._tails.values())))
            tail = self._tails[schema.names] = Tail(self._directory, self._number, schema)
            self._number += 1
            sync_directory(self._directory)
        elif len(self._tails) > 1:  # the most recently used tail is sealed last
            self._tails[schema.names] = self._tails.pop(schema.names)
        self._tail_of_schema[schema] = tail
        return tail

    def _seal(self, tail: Tail) -> None:
        """Turns a tail into a part, from what is really on disk, not from memory."""
        tail.flush()
        self._tail_of_schema = WeakKeyDictionary()
        del self._tails[tail.schema.names]
        tail.close()
        block, damaged = read_tail(tail.path.read_bytes())
        if damaged:
            return  # the tail stays, and a reader reports the damage
        write_part(self._directory, tail.number, block)
        tail.path.unlink()

    def flush(self) -> None:
        """See `Sink.flush`."""
        for tail in self._tails.values():
            tail.flush()
        self._events.flush()

    def close(self) -> None:
        """Seals the tails, and compacts the run if that takes only seconds."""
        self._events.close()
        for tail in list(self._tails.values()):
            self._seal(tail)
        if is_small(self._directory):
            compact(self._directory)


def _rows_of_a_part(metrics: int) -> int:
    fewest, most = _PART_ROWS
    return min(most, max(fewest, _PART_BYTES // (4 * max(1, metrics))))


def _open_events(path: Path) -> AppendFile:
    """Opens the file on a new line, even if a killed writer left an incomplete one."""
    is_incomplete = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    events = AppendFile(path)
    if is_incomplete:
        events.write(b"\n")
    return events

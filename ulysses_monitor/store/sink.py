"""The run store as a sink: metrics to columnar parts, events to events.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.store.directory import RunDirectory, without_secrets
from ulysses_monitor.store.parts import PartWriter, compact, next_part

__all__ = ["StoreSink"]


class StoreSink:
    """Writes a run directory's ``metrics/`` and ``events.jsonl``; loses nothing.

    Args:
        directory: the run directory, held for writing.
    """

    name = "store"
    lossless = True

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._parts: dict[Schema, PartWriter] = {}
        self._events = _open_events(directory.path / "events.jsonl")

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, StepRecord):
            self._part(item.schema).write(item)
        else:
            self._events.write(json.dumps(_as_json(item), ensure_ascii=False) + "\n")

    def _part(self, schema: Schema) -> PartWriter:
        if schema not in self._parts:
            self._parts[schema] = PartWriter(next_part(self._directory.metrics), schema)
        return self._parts[schema]

    def flush(self) -> None:
        """See `Sink.flush`."""
        for part in self._parts.values():
            part.flush()
        self._events.flush()

    def close(self) -> None:
        """Ends the parts and compacts them."""
        for part in self._parts.values():
            part.close()
        self._events.close()
        compact(self._directory.metrics)


def _open_events(path: Path) -> IO[str]:
    """Opens for appending, on a line of its own where a killed writer left half a line."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    events = path.open("a", encoding="utf-8")
    if torn:
        events.write("\n")
    return events


def _as_json(event: Event) -> dict[str, Any]:
    data = without_secrets(dict(event.data))
    return {"kind": event.kind, "step": event.step, "time": event.time, **_finite(data)}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no Inf: they become strings, which every reader understands."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

"""One JSON object a line: records and events, for jq, pandas and shell scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import event_as_json, plain
from ulysses_monitor.sinks.arguments import PathLike, Patterns
from ulysses_monitor.sinks.run_file import RunFile
from ulysses_monitor.sinks.selection import EVERYTHING, Selection

__all__ = ["JsonlSink"]


class JsonlSink:
    """A record is ``{"step", "time", "metrics"}``, an event ``{"kind", "step", "time", ...}``.

    NaN and Inf become the strings ``nan``, ``inf`` and ``-inf``; secrets in events are masked.

    Args:
        path: the file; ``metrics.jsonl`` in the run directory if not given.
        metrics: patterns of the metrics to write.

    Raises:
        InputError: an argument is wrong.
    """

    name = "jsonl"

    @checked_arguments("sink jsonl")
    def __init__(self, path: PathLike | None = None, metrics: Patterns = EVERYTHING) -> None:
        self._file = RunFile(self.name, path, "metrics.jsonl")
        self._selection = Selection(metrics)

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Learns the run directory."""
        self._file.open(run_dir, info)

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event):
            line = event_as_json(item)
        else:
            metrics = plain(dict(self._selection.items(item)))
            line = {"step": item.step, "time": item.time, "metrics": metrics}
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        self._file.append(text + "\n")

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._file.flush()

    def close(self) -> None:
        """See `Sink.close`."""
        self._file.close()

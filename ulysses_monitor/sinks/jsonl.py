"""A JSON Lines file with records and events, for jq, pandas and shell scripts."""

from __future__ import annotations

import json

from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import event_to_dict, to_jsonable
from ulysses_monitor.sinks.arguments import PathLike, Patterns
from ulysses_monitor.sinks.run_file import RunFile
from ulysses_monitor.sinks.selection import EVERYTHING, Selection

__all__ = ["JsonlSink"]


class JsonlSink(RunFile):
    """Writes one JSON object per line.

    A record is ``{"step", "time", "metrics"}``, an event ``{"kind", "step", "time", ...}``. NaN and
    Inf become the strings ``nan``, ``inf`` and ``-inf``. Secrets in events are masked.

    Args:
        path: the file; by default, ``metrics.jsonl`` in the run directory.
        metrics: patterns of the metrics to write.

    Raises:
        InputError: an argument is wrong.
    """

    name = "jsonl"

    @checked_arguments("sink jsonl")
    def __init__(self, path: PathLike | None = None, metrics: Patterns = EVERYTHING) -> None:
        super().__init__(self.name, path, "metrics.jsonl")
        self._selection = Selection(metrics)

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event):
            line = event_to_dict(item)
        else:
            metrics = to_jsonable(dict(self._selection.items(item)))
            line = {"step": item.step, "time": item.time, "metrics": metrics}
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        self.append(text + "\n")

"""A CSV file in long form, so that a schema that grows fits in: ``step,time,metric,value``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.arguments import PathLike, Patterns
from ulysses_monitor.sinks.run_file import RunFile
from ulysses_monitor.sinks.selection import EVERYTHING, Selection

__all__ = ["CsvSink"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""How a cell begins that a spreadsheet evaluates (OWASP, "CSV Injection")."""


class CsvSink:
    """Writes a row per metric and record; events are not written.

    A name that a spreadsheet would run as a formula gets a ``'`` in front.

    Args:
        path: the file; ``metrics.csv`` in the run directory if not given.
        metrics: patterns of the metrics to write.

    Raises:
        InputError: an argument is wrong.
    """

    name = "csv"

    @checked_arguments("sink csv")
    def __init__(self, path: PathLike | None = None, metrics: Patterns = EVERYTHING) -> None:
        self._file = RunFile(self.name, path, "metrics.csv", header="step,time,metric,value\n")
        self._selection = Selection(metrics)

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Learns the run directory."""
        self._file.open(run_dir, info)

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event):
            return
        lines = io.StringIO()
        rows = csv.writer(lines, lineterminator="\n")
        for name, value in self._selection.items(item):
            rows.writerow((item.step, item.time, _as_text(name), value))
        self._file.append(lines.getvalue())

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._file.flush()

    def close(self) -> None:
        """See `Sink.close`."""
        self._file.close()


def _as_text(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name

"""A CSV file in long form, ``step,time,metric,value``, so that the schema may grow."""

from __future__ import annotations

import csv
import io

from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.arguments import PathLike, Patterns
from ulysses_monitor.sinks.run_file import RunFile
from ulysses_monitor.sinks.selection import EVERYTHING, Selection

__all__ = ["CsvSink"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""First characters of cells that spreadsheets evaluate (OWASP, "CSV Injection")."""


class CsvSink(RunFile):
    """Writes one row per record and metric, and no events.

    A name that a spreadsheet would evaluate as a formula gets a leading ``'``.

    Args:
        path: the file; by default, ``metrics.csv`` in the run directory.
        metrics: patterns of the metrics to write.

    Raises:
        InputError: an argument is wrong.
    """

    name = "csv"

    @checked_arguments("sink csv")
    def __init__(self, path: PathLike | None = None, metrics: Patterns = EVERYTHING) -> None:
        super().__init__(self.name, path, "metrics.csv", header="step,time,metric,value\n")
        self._selection = Selection(metrics)

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event):
            return
        lines = io.StringIO()
        rows = csv.writer(lines, lineterminator="\n")
        for name, value in self._selection.items(item):
            rows.writerow((item.step, item.time, _as_text(name), value))
        self.append(lines.getvalue())


def _as_text(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name

"""Opens recorded runs: one or many, finished or live, local or at a URL, ours or another tool's."""

from ulysses_monitor.reading.chunks import find_last_step, read_columns, read_windows
from ulysses_monitor.reading.failure import Failure, read_failure
from ulysses_monitor.reading.nonfinite import hide_partial_norms
from ulysses_monitor.reading.opening import open_runs
from ulysses_monitor.reading.overview import Overview
from ulysses_monitor.reading.reader import RunReader, open_run
from ulysses_monitor.reading.run_set import RunSet
from ulysses_monitor.reading.selection import make_name_filter, take_rows

__all__ = [
    "Failure",
    "Overview",
    "RunReader",
    "RunSet",
    "find_last_step",
    "hide_partial_norms",
    "make_name_filter",
    "open_run",
    "open_runs",
    "read_columns",
    "read_failure",
    "read_windows",
    "take_rows",
]

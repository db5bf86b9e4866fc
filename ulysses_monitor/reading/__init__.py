"""Opens recorded runs: one or many, finished or alive, here or at a URL, ours or another tool's."""

from ulysses_monitor.reading.opening import open_runs
from ulysses_monitor.reading.reader import RunReader, open_run
from ulysses_monitor.reading.run_set import RunSet

__all__ = ["RunReader", "RunSet", "open_run", "open_runs"]

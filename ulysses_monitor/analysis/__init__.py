"""What can be done with a recorded run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ulysses_monitor.analysis.opening import open_runs
from ulysses_monitor.analysis.reader import RunReader, open_run
from ulysses_monitor.analysis.run_set import RunSet

if TYPE_CHECKING:
    from ulysses_monitor.analysis.report import write_report

__all__ = ["RunReader", "RunSet", "open_run", "open_runs", "write_report"]


def __getattr__(name: str) -> Any:
    """Imports `write_report` when it is asked for: it needs matplotlib, the rest does not."""
    if name == "write_report":
        from ulysses_monitor.analysis.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

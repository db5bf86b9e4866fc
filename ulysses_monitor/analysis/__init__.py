"""What can be done with a recorded run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ulysses_monitor.analysis.reader import RunReader, open_run

if TYPE_CHECKING:
    from ulysses_monitor.analysis.report import write_report

__all__ = ["RunReader", "open_run", "write_report"]


def __getattr__(name: str) -> Any:
    """Imports `write_report` when it is asked for: it needs matplotlib, the rest does not."""
    if name == "write_report":
        from ulysses_monitor.analysis.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

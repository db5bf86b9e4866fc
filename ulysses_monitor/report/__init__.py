"""Pages, charts and tables of a recorded run."""

from ulysses_monitor.report.page import write_report

__all__ = ["write_report"]

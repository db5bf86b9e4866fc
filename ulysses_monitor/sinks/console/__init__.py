"""Progress in the terminal: a live table on one, plain lines elsewhere."""

from ulysses_monitor.sinks.console.sink import ConsoleSink

__all__ = ["ConsoleSink"]

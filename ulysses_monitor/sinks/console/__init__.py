"""Progress for people: a live table in a terminal, plain lines elsewhere."""

from ulysses_monitor.sinks.console.sink import ConsoleSink

__all__ = ["ConsoleSink"]

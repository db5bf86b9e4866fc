"""Progress for people: a live table in a terminal, plain lines elsewhere."""

from ulysses_monitor.common.random_state import keep_random_state

with keep_random_state():  # rich draws from it when it is imported
    from ulysses_monitor.sinks.console.sink import ConsoleSink

__all__ = ["ConsoleSink"]

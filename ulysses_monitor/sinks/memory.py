"""A sink that keeps everything in memory, for notebooks and tests."""

from __future__ import annotations

from ulysses_monitor.records import Event, StepRecord

__all__ = ["MemorySink"]


class MemorySink:
    """Keeps records and events in the order in which they came.

    Attributes:
        records: every `StepRecord`.
        events: every `Event`.
    """

    name = "memory"
    lossless = True

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.events: list[Event] = []

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, StepRecord):
            self.records.append(item)
        else:
            self.events.append(item)

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

"""What a sink is. A user's own sink is any object with these three methods."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ulysses_monitor.records import Event, StepRecord

__all__ = ["Sink", "is_lossless", "sink_name"]


@runtime_checkable
class Sink(Protocol):
    """Receives every record and event, on a thread of its own, in order.

    A method that raises is counted and logged and never reaches the training. An attribute
    ``lossless = True`` asks for a queue that drops nothing; ``name`` is used in messages.

    A method ``open(run_dir, info)``, where there is one, is called before the first item, with the
    run directory and what run.json holds. A constructor opens nothing: it runs on every rank.
    """

    def write(self, item: StepRecord | Event) -> None:
        """Takes one record or event."""
        ...

    def flush(self) -> None:
        """Makes what was written visible to readers; called when the queue is empty."""
        ...

    def close(self) -> None:
        """Releases everything; the last call."""
        ...


def sink_name(sink: Sink) -> str:
    """The sink's ``name``, or its class's."""
    return str(getattr(sink, "name", type(sink).__name__))


def is_lossless(sink: Sink) -> bool:
    """Whether the bus must never drop an item of this sink."""
    return bool(getattr(sink, "lossless", False))

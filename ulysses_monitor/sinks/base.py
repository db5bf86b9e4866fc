"""The sink contract: any object with `write`, `flush` and `close` is a sink.

To add a sink to the project, write a class with these methods, and add its name to the registry of
sinks. A user's own sink needs no base class and no registration::

    class PrintSink:
        def write(self, item):
            print(item)

        def flush(self): ...

        def close(self): ...
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ulysses_monitor.records import Event, StepRecord

__all__ = ["Sink", "is_lossless", "sink_name"]


@runtime_checkable
class Sink(Protocol):
    """Receives every record and event in order, on a thread of its own, on rank 0.

    The bus logs and counts the errors of a sink; they never reach the training. It retries an item
    after an `OSError`, and drops it after any other error.

    A sink may also have:

    - ``name``, a string for messages; the name of the class by default;
    - ``lossless = True``, which asks for a queue that drops nothing;
    - ``open(run_dir, info)``, which is called before the first item with the run directory and the
      content of run.json.

    A constructor must not open anything, because it runs on every rank.
    """

    def write(self, item: StepRecord | Event) -> None:
        """Takes one record or event."""
        ...

    def flush(self) -> None:
        """Makes what was written visible to readers.

        Called when the queue is empty, and several times a second while it is not.
        """
        ...

    def close(self) -> None:
        """Releases everything; this is the last call."""
        ...


def sink_name(sink: Sink) -> str:
    """Returns the sink's ``name``, or the name of its class."""
    return str(getattr(sink, "name", type(sink).__name__))


def is_lossless(sink: Sink) -> bool:
    """Returns whether the sink asks for a queue that drops nothing."""
    return bool(getattr(sink, "lossless", False))

"""Hands what the training thread publishes to every sink.

Publishing puts one object on a queue per sink and returns; a worker thread per sink does the
writing. A sink that raises is reported once, counted, switched off after `MAX_FAILURES` failures in
a row and tried again with growing pauses. A live sink that is slow loses its oldest records, and
the loss is counted; a lossless sink (the run store) loses none while there is room in memory or on
disk. Training never waits and never stops for a sink.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ulysses_monitor.bus.queues import Item
from ulysses_monitor.bus.worker import Worker
from ulysses_monitor.records import Event
from ulysses_monitor.sinks.base import Sink

__all__ = ["Bus"]

_open: WeakSet[Bus] = WeakSet()


class Bus:
    """Hands records and events to every sink.

    Args:
        sinks: where items go.
        opening: run directory and what run.json says, for sinks that have an `open`.
        queue_bytes: what may wait in memory for each sink.
        spill_bytes: what may wait on disk for a lossless sink.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        opening: tuple[Path, Mapping[str, Any]] | None = None,
        *,
        queue_bytes: int = 64 << 20,
        spill_bytes: int = 1 << 30,
    ) -> None:
        self._closed, self._step = False, 0
        self._workers: list[Worker] = []
        self._workers = [
            Worker(sink, queue_bytes, spill_bytes, self._report, opening) for sink in sinks
        ]
        _watch_forks(self)

    def publish(self, item: Item) -> None:
        """Queues `item` for every sink; never blocks, never raises. After `close`, does nothing."""
        if not self._closed:
            self._step = item.step
            for worker in self._workers:
                worker.put(item)

    def _report(self, about: Mapping[str, Any]) -> None:
        """Lets the run itself say what became of its sinks."""
        self.publish(Event(kind="monitor", step=self._step, time=time.time(), data=about))

    def dropped(self) -> dict[str, int]:
        """Items that each sink lost so far, by its name."""
        return {worker.name: worker.dropped for worker in self._workers}

    def close(self, timeout: float = 10.0) -> None:
        """Writes out what is queued and closes the sinks, within `timeout` seconds in all."""
        if self._closed:
            return
        self._closed = True
        now = time.monotonic()
        deadline = now + timeout
        for worker in self._workers:
            worker.stop(now + 0.9 * timeout)  # the rest is for closing the sink
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def forget(self) -> None:
        """Lets go of everything, writing nothing; for a forked child, which has no threads."""
        self._closed = True
        self._workers = []


def _watch_forks(bus: Bus) -> None:
    """A forked child, such as a data loader's worker, must neither queue nor wait."""
    if not _forks:
        os.register_at_fork(after_in_child=_forget_all)
        _forks.append(True)
    _open.add(bus)


def _forget_all() -> None:
    for bus in _open:
        bus.forget()


_forks: list[bool] = []
"""Not empty once forks are watched: importing alone changes nothing."""

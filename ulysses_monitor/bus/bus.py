"""Hands what the training thread publishes to every sink.

Publishing puts one object on a queue and returns; a thread hands it to the queues of the sinks, and
a worker thread per sink does the writing. A sink that raises is reported once, counted, switched
off after `MAX_FAILURES` failures in a row and tried again with growing pauses. A live sink that is
slow loses its oldest records, and the loss is counted; a lossless sink (the run store) loses none
while there is room in memory or on disk. Training never waits and never stops for a sink.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ulysses_monitor.bus.queues import Item
from ulysses_monitor.bus.worker import Report, Worker
from ulysses_monitor.records import Event
from ulysses_monitor.sinks.base import Sink, sink_name

__all__ = ["Bus"]

logger = logging.getLogger(__name__)

_open: WeakSet[Bus] = WeakSet()

_PAUSE, _LONGEST_PAUSE = 0.02, 0.1
"""Seconds between two looks at what was published: while something comes, and while nothing."""

_MOST_PUBLISHED = 4096
"""Items that may wait where even the disk for what waits hangs."""


class Bus:
    """Hands records and events to every sink.

    Args:
        sinks: where items go.
        opening: run directory and what run.json says, for sinks that have an `open`.
        report: told what becomes of the sinks; the bus itself publishes it where not given.
        queue_bytes: what may wait in memory for each sink.
        spill_bytes: what may wait on disk for a lossless sink.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        opening: tuple[Path, Mapping[str, Any]] | None = None,
        *,
        report: Report | None = None,
        queue_bytes: int = 64 << 20,
        spill_bytes: int = 1 << 30,
    ) -> None:
        self._closed, self._step, self._lost = False, 0, 0
        # Looked at now and then: waking a thread costs the publisher ten times the rest.
        self._published: deque[Item] = deque()
        self._end = threading.Event()
        self._workers = [
            Worker(sink, name, queue_bytes, spill_bytes, report or self.report, opening)
            for sink, name in zip(sinks, _names(sinks), strict=True)
        ]
        self._thread = threading.Thread(target=self._hand_out, name="bus", daemon=True)
        self._thread.start()
        _watch_forks(self)

    def publish(self, item: Item) -> None:
        """Queues `item` for every sink; never blocks, never raises. After `close`, does nothing."""
        if self._closed:
            return
        if len(self._published) < _MOST_PUBLISHED:
            self._published.append(item)
        else:
            self._lost += 1

    def _hand_out(self) -> None:
        pause = _LONGEST_PAUSE
        while not self._end.wait(pause):
            pause = _PAUSE if self._published else min(1.2 * pause, _LONGEST_PAUSE)
            self._hand_out_all()
        self._hand_out_all()

    def _hand_out_all(self) -> None:
        while self._published:
            item = self._published.popleft()
            self._step = item.step
            for worker in self._workers:
                try:
                    worker.put(item)
                except Exception:  # a thread that ends here would end every sink
                    logger.exception("monitor: sink %s lost a record", worker.name)

    def report(self, about: Mapping[str, Any]) -> None:
        """Lets the run itself say what became of its sinks."""
        self.publish(Event(kind="monitor", step=self._step, time=time.time(), data=about))

    def dropped(self) -> dict[str, int]:
        """Items that each sink lost so far, by its name."""
        return {worker.name: worker.dropped + self._lost for worker in self._workers}

    def close(self, timeout: float = 10.0) -> bool:
        """Writes out what is queued and closes the sinks, within `timeout` seconds in all.

        Returns:
            Whether all of them ended; one that did not may still write.
        """
        if self._closed:
            return self._ended
        self._closed = True
        now = time.monotonic()
        deadline = now + timeout
        self._end.set()
        self._thread.join(timeout)
        for worker in self._workers:
            worker.stop(now + 0.9 * timeout)  # the rest is for closing the sink
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return self._ended

    @property
    def _ended(self) -> bool:
        return not any(worker.is_alive for worker in self._workers)

    def abandon(self) -> None:
        """Lets go of everything, writing nothing; for a forked child, which has no threads."""
        self._closed = True
        self._workers = []


def _names(sinks: Sequence[Sink]) -> list[str]:
    """Names that tell the sinks apart in messages and counts."""
    seen: Counter[str] = Counter()
    names = []
    for name in map(sink_name, sinks):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _watch_forks(bus: Bus) -> None:
    """A forked child, such as a data loader's worker, must neither queue nor wait."""
    if not _forks:
        os.register_at_fork(after_in_child=_abandon_all)
        _forks.append(True)
    _open.add(bus)


def _abandon_all() -> None:
    for bus in _open:
        bus.abandon()


_forks: list[bool] = []
"""Not empty once forks are watched: importing alone changes nothing."""

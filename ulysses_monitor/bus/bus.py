"""The bus: delivers what the training thread publishes to every sink.

`Bus.publish` puts one item on a queue and returns. A thread moves items to the queue of each sink,
and one worker thread per sink writes them. A sink that raises is reported once, counted, switched
off after `MAX_FAILURES` failures in a row, and retried with growing pauses. A live sink that is
slow loses its oldest records, and the bus counts the loss; a lossless sink (the run store) loses
nothing while there is room in memory or on disk. Training never waits for a sink and never stops
because of one.
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
"""Seconds between two looks at the published items, when busy and when idle."""

_MOST_PUBLISHED = 4096
"""Most items that wait to be moved, which matters only when even the spill disk hangs."""


class Bus:
    """Delivers records and events to every sink.

    Args:
        sinks: the sinks.
        opening: the arguments of `open` for sinks that have it: the run directory and the content
            of run.json.
        report: called when a sink fails, is switched off or works again, with what an event says
            about it; by default, the bus publishes that event itself.
        queue_bytes: bytes that may wait in memory for each sink.
        spill_bytes: bytes that may wait on disk for each lossless sink.
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
        # The thread polls, because waking it would make publishing ten times as expensive.
        self._published: deque[Item] = deque()
        self._end = threading.Event()
        self._workers = [
            Worker(sink, name, queue_bytes, spill_bytes, report or self.report, opening)
            for sink, name in zip(sinks, _names(sinks), strict=True)
        ]
        self._thread = threading.Thread(target=self._deliver, name="bus", daemon=True)
        self._thread.start()
        _watch_forks(self)

    def publish(self, item: Item) -> None:
        """Queues an item for every sink; never blocks and never raises. Ignored after `close`."""
        if self._closed:
            return
        if len(self._published) < _MOST_PUBLISHED:
            self._published.append(item)
        else:
            self._lost += 1

    def _deliver(self) -> None:
        pause = _LONGEST_PAUSE
        while not self._end.wait(pause):
            pause = _PAUSE if self._published else min(1.2 * pause, _LONGEST_PAUSE)
            self._deliver_published()
        self._deliver_published()

    def _deliver_published(self) -> None:
        while self._published:
            item = self._published.popleft()
            self._step = item.step
            for worker in self._workers:
                try:
                    worker.put(item)
                except Exception:  # ending this thread would stop every sink
                    logger.exception("monitor: sink %s lost a record", worker.name)

    def report(self, about: Mapping[str, Any]) -> None:
        """Publishes an event of kind ``monitor`` about a sink."""
        self.publish(Event(kind="monitor", step=self._step, time=time.time(), data=about))

    def dropped(self) -> dict[str, int]:
        """Returns the number of items that each sink has lost so far, by sink name."""
        return {worker.name: worker.dropped + self._lost for worker in self._workers}

    def close(self, timeout: float = 10.0) -> bool:
        """Writes what is queued and closes the sinks, all within `timeout` seconds.

        Returns:
            Whether all sinks finished; one that did not may still write.
        """
        if self._closed:
            return self._has_ended
        self._closed = True
        now = time.monotonic()
        deadline = now + timeout
        self._end.set()
        self._thread.join(timeout)
        for worker in self._workers:
            worker.stop(now + 0.9 * timeout)  # the rest is for closing the sink
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return self._has_ended

    @property
    def _has_ended(self) -> bool:
        return not any(worker.is_alive for worker in self._workers)

    def abandon(self) -> None:
        """Drops everything unwritten, for a forked child, which has none of the threads."""
        self._closed = True
        self._workers = []


def _names(sinks: Sequence[Sink]) -> list[str]:
    """Returns a unique name for each sink, for messages and counts."""
    seen: Counter[str] = Counter()
    names = []
    for name in map(sink_name, sinks):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _watch_forks(bus: Bus) -> None:
    """Makes forked children, such as data loader workers, neither queue nor wait."""
    if not _forks:
        os.register_at_fork(after_in_child=_abandon_all)
        _forks.append(True)
    _open.add(bus)


def _abandon_all() -> None:
    for bus in _open:
        bus.abandon()


_forks: list[bool] = []
"""Not empty once the fork hook is registered, which importing this file must not do."""

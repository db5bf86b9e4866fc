"""The bus between the training thread and the sinks.

Publishing puts one object on a queue per sink and returns; a worker thread per sink does the
writing. A sink that raises is reported once, counted, and switched off after `MAX_FAILURES`
failures in a row. A live sink that is slow loses its oldest records, and the loss is counted; a
lossless sink (the run store) never loses one. Training never waits and never stops for a sink.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.base import Sink, is_lossless, sink_name

__all__ = ["MAX_FAILURES", "Bus"]

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
"""Failures in a row after which a sink is switched off."""

_FLUSH_SECONDS = 1.0


class Bus:
    """Hands records and events to every sink.

    Args:
        sinks: where items go.
        queue_size: items that wait for a live sink before the oldest is dropped.
    """

    def __init__(self, sinks: Sequence[Sink], queue_size: int = 1024) -> None:
        self._workers = [_Worker(sink, queue_size) for sink in sinks]
        self._closed = False

    def publish(self, item: StepRecord | Event) -> None:
        """Queues `item` for every sink; never blocks, never raises. After `close`, does nothing."""
        if not self._closed:
            for worker in self._workers:
                worker.put(item)

    def dropped(self) -> dict[str, int]:
        """Records that each sink lost so far, by its name."""
        return {worker.name: worker.dropped for worker in self._workers}

    def close(self, timeout: float = 10.0) -> None:
        """Writes out what is queued and closes the sinks, within `timeout` seconds in all."""
        self._closed = True
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    """The queue and the thread of one sink."""

    def __init__(self, sink: Sink, queue_size: int) -> None:
        self.name = sink_name(sink)
        self.dropped = 0
        self._sink = sink
        self._limit = None if is_lossless(sink) else queue_size
        self._queue: deque[StepRecord | Event] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failures = dict.fromkeys(("write", "flush", "close"), 0)
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)
        self._thread.start()

    def put(self, item: StepRecord | Event) -> None:
        with self._wake:
            if self._limit is not None and len(self._queue) >= self._limit:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(item)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error(
                "monitor: sink %s did not finish in time; its last records may be missing",
                self.name,
            )

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._queue and not self._stopping:
                    self._wake.wait(_FLUSH_SECONDS)
                items = list(self._queue)
                self._queue.clear()
                stopping = self._stopping
            self._deliver(items)
            if stopping:
                break
        self._attempt("close")

    def _deliver(self, items: list[StepRecord | Event]) -> None:
        for item in items:
            if self._is_off():
                self.dropped += 1
            else:
                self._attempt("write", item)
        if items and not self._is_off():
            self._attempt("flush")

    def _is_off(self) -> bool:
        return max(self._failures.values()) >= MAX_FAILURES

    def _attempt(self, method: str, *args: StepRecord | Event) -> None:
        try:
            getattr(self._sink, method)(*args)
        except Exception as error:  # noqa: BLE001 - a sink may raise anything; it is reported
            self._failures[method] += 1
            self.dropped += method == "write"
            if self._failures[method] == 1:
                logger.warning(
                    "monitor: sink %s failed: %s: %s", self.name, type(error).__name__, error
                )
            if self._failures[method] == MAX_FAILURES:
                logger.error(
                    "monitor: sink %s failed %d times in a row: off", self.name, MAX_FAILURES
                )
        else:
            self._failures[method] = 0

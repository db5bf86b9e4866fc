"""The queue and the thread of one sink."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ulysses_monitor.bus.health import MAX_FAILURES, Change, Health
from ulysses_monitor.bus.queues import Item, LosslessQueue, Queue
from ulysses_monitor.common.masking import mask_text
from ulysses_monitor.sinks.base import Sink, is_lossless

__all__ = ["Report", "Worker"]

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]
"""Called with the data of an event about a sink: its name, its state, the error."""

_FLUSH_SECONDS = 0.25
"""Longest time from writing an item to flushing it. Together with the store's own wait, a step is
safe on disk within one second."""

_SETTLE_SECONDS = 0.6
"""Time from a flush that nothing follows to one more flush; longer than the store's pause between
two syncs, so that the last steps are synced too."""

_HANG_SECONDS = 30.0
"""Longest call of a sink before a warning."""


class Worker:
    """Writes to one sink what is put on its queue.

    An `OSError` means that the medium failed (a full disk, an unreachable server), so the worker
    keeps the item and retries. Any other error means that the sink rejects the item, so the worker
    drops it.

    Args:
        sink: the sink.
        name: name of the sink in messages.
        limit: most bytes that wait in memory.
        spill_limit: most bytes that wait on disk, for a lossless sink.
        report: called with what an event should say when the sink fails or recovers.
        opening: arguments of the sink's `open`, if it has one.
    """

    def __init__(
        self,
        sink: Sink,
        name: str,
        limit: int,
        spill_limit: int,
        report: Report,
        opening: tuple[Any, ...] | None = None,
    ) -> None:
        self.name = name
        self._sink, self._report = sink, report
        lossless = is_lossless(sink)
        self._queue = LosslessQueue(limit, spill_limit) if lossless else Queue(limit)
        self._opening = opening if hasattr(sink, "open") else None
        self._health = Health()
        self._lock = threading.Condition()
        self._deadline: float | None = None
        self._lost = 0
        self._unflushed, self._flushed = 0, time.monotonic()
        self._settles_at = math.inf
        self._busy_since: float | None = None
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Number of items that the sink did not get."""
        return self._queue.dropped + self._lost

    def put(self, item: Item) -> None:
        """Queues an item; may wait for the spill disk, never for the sink."""
        with self._lock:
            self._queue.put(item)
            self._lock.notify()
        if isinstance(self._queue, LosslessQueue):
            self._queue.spill(self._lock)
        self._warn_if_hanging()

    def _warn_if_hanging(self) -> None:
        since = self._busy_since
        if since is not None and not self._has_warned:
            seconds = time.monotonic() - since
            if seconds > _HANG_SECONDS:
                self._has_warned = True
                logger.warning(
                    "monitor: sink %s has not responded for %.0f s; training continues",
                    self.name,
                    seconds,
                )

    def stop(self, deadline: float) -> None:
        """Asks the thread to write what waits, close the sink and end.

        Args:
            deadline: monotonic time in seconds at which it gives up.
        """
        with self._lock:
            self._deadline = deadline
            self._health.retry_soon()
            self._lock.notify()

    @property
    def is_alive(self) -> bool:
        """Whether the thread may still write."""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Waits for the thread."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error(
                "monitor: sink %s did not finish in time; its last records may be missing",
                self.name,
            )

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        opening = self._opening or ()
        while self._wait():
            if self._opening is not None:
                self._opening = None if self._attempt("open", lambda: opening) else opening
            elif self._is_flush_due():
                self._flush()
            elif len(self._queue):
                self._write_first()
            else:
                break
        with self._lock:
            self._lost += len(self._queue)
        if not self._attempt("close"):
            self._lost += self._unflushed
        if self.dropped:
            logger.error("monitor: sink %s lost %d records and events", self.name, self.dropped)

    def _wait(self) -> bool:
        """Waits until there is something to do; returns False if it is time to end."""
        with self._lock:
            while True:
                now = time.monotonic()
                if self._deadline is not None and (now >= self._deadline or self._is_hopeless()):
                    return False
                pause = self._health.pause(now)
                settle = self._settles_at - now
                if not pause and (len(self._queue) or self._deadline or settle <= 0):
                    return True
                limits = [pause, settle, (self._deadline or math.inf) - now]
                self._lock.wait(min((t for t in limits if 0 < t < math.inf), default=None))

    def _is_hopeless(self) -> bool:
        """Returns whether waiting is pointless: at the run's end, a live sink that is off."""
        return self._health.is_off and not isinstance(self._queue, LosslessQueue)

    def _is_flush_due(self) -> bool:
        now = time.monotonic()
        if not self._unflushed:
            return now >= self._settles_at
        if self._health.is_failing("flush") or not len(self._queue):
            return True
        return now - self._flushed >= _FLUSH_SECONDS

    def _flush(self) -> None:
        """Flushes, and schedules one more flush for sinks that sync only now and then."""
        is_first, self._flushed = self._unflushed > 0, time.monotonic()
        if self._attempt("flush"):
            self._unflushed = 0
            self._settles_at = self._flushed + _SETTLE_SECONDS if is_first else math.inf

    def _write_first(self) -> None:
        with self._lock:
            entry = self._queue.first()
        if self._attempt("write", lambda: (entry.item(),)):
            self._unflushed += 1
            self._settles_at = 0.0
            with self._lock:
                self._queue.remove_first()

    def _attempt(self, method: str, arguments: Callable[[], tuple[Any, ...]] = tuple) -> bool:
        """Calls a method of the sink; returns False if the same call must be retried."""
        self._busy_since = time.monotonic()
        try:
            getattr(self._sink, method)(*arguments())
        except BaseException as error:  # noqa: BLE001 - a sink may raise anything; it is reported
            self._report_change(self._health.count_failure(method, time.monotonic()), error)
            must_retry = isinstance(error, OSError) or method != "write"
            self._lost += not must_retry
            return not must_retry
        finally:
            self._busy_since = None
        self._report_change(self._health.count_success(method))
        return True

    def _report_change(self, change: Change | None, error: BaseException | None = None) -> None:
        if change is None:
            return
        reason = _describe(error) if error else ""
        if change == "failed":
            logger.warning("monitor: sink %s failed: %s", self.name, reason)
        elif change == "off":
            logger.error(
                "monitor: sink %s failed %d times in a row and is off; it will be retried: %s",
                self.name,
                MAX_FAILURES,
                reason,
            )
        else:
            logger.warning("monitor: sink %s works again", self.name)
        about = {"sink": self.name, "state": change, "dropped": self.dropped}
        self._report(about | ({"error": reason} if error else {}))


def _describe(error: BaseException) -> str:
    try:
        return mask_text(f"{type(error).__name__}: {error}")
    except Exception:  # noqa: BLE001 - the error cannot even be printed
        return type(error).__name__

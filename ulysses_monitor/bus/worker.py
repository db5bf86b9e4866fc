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

_FLUSH_SECONDS = 0.25
"""Longest wait of a written item for a flush: with the store's own wait, a step is safe in one
second."""

_SETTLE_SECONDS = 0.6
"""After a flush that nothing follows, until another one: longer than the store waits for the disk
again."""

_HANG_SECONDS = 30.0
_LOSSLESS_PAUSE = 0.1


class Worker:
    """Writes to one sink what is put on its queue.

    An item is kept and tried again where the failure is the medium's (`OSError`: a full disk, a
    server that is away); any other failure is the item's own, which is dropped.

    Args:
        sink: the sink.
        name: of the sink, in messages.
        limit: bytes that may wait in memory.
        spill_limit: bytes that may wait on disk for a lossless sink.
        report: told what happens to the sink.
        opening: arguments of the sink's `open`, if it has one and is to be opened.

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
        self._said_hanging = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Items that the sink did not get."""
        return self._queue.dropped + self._lost

    def put(self, item: Item) -> None:
        """Queues an item; waits for the disk where there is too much of it, never for the sink."""
        with self._lock:
            self._queue.put(item)
            self._lock.notify()
        if isinstance(self._queue, LosslessQueue):
            self._queue.spill(self._lock)
        self._look_for_hanging()

    def _look_for_hanging(self) -> None:
        since = self._busy_since
        if since is not None and not self._said_hanging:
            seconds = time.monotonic() - since
            if seconds > _HANG_SECONDS:
                self._said_hanging = True
                logger.warning("monitor: sink %s stands still for %.0f s", self.name, seconds)

    def stop(self, deadline: float) -> None:
        """Asks the thread to write out what waits, close the sink and end.

        Args:
            deadline: monotonic seconds after which it gives up.
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
            elif self._flush_is_due():
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
            logger.error("monitor: sink %s did not get %d items", self.name, self.dropped)

    def _wait(self) -> bool:
        """Waits until there is something to do; false where the time is over."""
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
        """The run's end does not wait for a live sink that is off."""
        return self._health.is_off and not isinstance(self._queue, LosslessQueue)

    def _flush_is_due(self) -> bool:
        now = time.monotonic()
        if not self._unflushed:
            return now >= self._settles_at
        if self._health.is_failing("flush") or not len(self._queue):
            return True
        return now - self._flushed >= _FLUSH_SECONDS

    def _flush(self) -> None:
        """Flushes, and once more later: a sink that waits for the disk does so now and then."""
        first, self._flushed = self._unflushed > 0, time.monotonic()
        if self._attempt("flush"):
            self._unflushed = 0
            self._settles_at = self._flushed + _SETTLE_SECONDS if first else math.inf

    def _write_first(self) -> None:
        with self._lock:
            entry = self._queue.first()
        if self._attempt("write", lambda: (entry.item(),)):
            self._unflushed += 1
            self._settles_at = 0.0
            with self._lock:
                self._queue.done()

    def _attempt(self, method: str, arguments: Callable[[], tuple[Any, ...]] = tuple) -> bool:
        """Calls the sink; false where the same is to be tried again."""
        self._busy_since = time.monotonic()
        try:
            getattr(self._sink, method)(*arguments())
        except BaseException as error:  # noqa: BLE001 - a sink may raise anything; it is reported
            self._say(self._health.failed(method, time.monotonic()), error)
            again = isinstance(error, OSError) or method != "write"
            self._lost += method == "write" and not again
            return not again
        finally:
            self._busy_since = None
        self._say(self._health.succeeded(method))
        return True

    def _say(self, change: Change | None, error: BaseException | None = None) -> None:
        if change is None:
            return
        reason = _described(error) if error else ""
        if change == "failed":
            logger.warning("monitor: sink %s failed: %s", self.name, reason)
        elif change == "off":
            logger.error(
                "monitor: sink %s failed %d times in a row: off, and tried again later: %s",
                self.name,
                MAX_FAILURES,
                reason,
            )
        else:
            logger.warning("monitor: sink %s works again", self.name)
        about = {"sink": self.name, "state": change, "dropped": self.dropped}
        self._report(about | ({"error": reason} if error else {}))


def _described(error: BaseException) -> str:
    try:
        return mask_text(f"{type(error).__name__}: {error}")
    except Exception:  # noqa: BLE001 - one that cannot even be printed
        return type(error).__name__

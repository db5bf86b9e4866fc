"""Ends a run also where the process is told to go: at its exit, and at SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, Literal

__all__ = ["AtTheEnd", "Status"]

Status = Literal["finished", "failed", "stopped"]


class AtTheEnd:
    """Calls `close` when this process exits or gets SIGTERM, until `undo`.

    Where nobody else handles SIGTERM, the process dies of it once the run is closed. A handler of
    the user's own decides itself: it is called at once, and may let the training go on, of which
    every rank must then be watched as before; the exit closes the run.

    A forked child inherits both and must touch nothing: only the process that made this counts.
    Signals can be caught in the main thread only; elsewhere it is the exit alone.
    """

    def __init__(self, close: Callable[[Status], None]) -> None:
        self._close, self._process = close, os.getpid()
        self._told = self._is_closing = False
        self._waiting: int | None = None
        self._before: Any = signal.getsignal(signal.SIGTERM) if _in_main_thread() else None
        # Not where it is ignored, or belongs to what is not Python's.
        if self._before not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGTERM, self._terminate)
        atexit.register(self._leave)
        # What multiprocessing started ends without the former.
        self._finalizer = Finalize(None, self._leave, exitpriority=10)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """While the run is being closed, SIGTERM waits; it comes afterwards."""
        self._is_closing = True
        try:
            yield
        finally:
            self._is_closing = False
            self.undo()
            if self._waiting is not None:
                os.kill(os.getpid(), self._waiting)

    def judged(self, status: Status) -> Status:
        """What a failure is after a SIGTERM that the user's own handler took."""
        return "stopped" if self._told and status == "failed" else status

    def undo(self) -> None:
        """Gives both back."""
        atexit.unregister(self._leave)
        self._finalizer.cancel()
        # Whoever took the signal after us keeps it.
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, self._before)

    def _leave(self) -> None:
        # An exception that nobody caught; Ctrl-C is no failure.
        interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
        if os.getpid() == self._process:
            self._close("stopped" if interrupted else "failed")

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._is_closing:
            self._waiting = number
            return
        if callable(self._before):
            self._told = True
            self._before(number, frame)
            return
        if os.getpid() == self._process:
            self._close("stopped")
        self.undo()
        os.kill(os.getpid(), number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

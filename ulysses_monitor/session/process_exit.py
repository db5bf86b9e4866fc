"""Ends a run when its process ends without closing it: at the interpreter's exit and at SIGTERM."""

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

__all__ = ["ProcessExit", "Status"]

Status = Literal["finished", "failed", "stopped"]


class ProcessExit:
    """Calls `close` when this process exits or gets SIGTERM, until `undo`.

    If nobody else handles SIGTERM, the process dies of it once the run is closed. A handler of the
    user's own decides for itself: it is called at once and may let the training continue, which
    every rank must then watch as before; the exit closes the run.

    A forked child inherits both and must touch nothing: only the process that made this object
    counts. Python catches signals in the main thread only; elsewhere only the exit is watched.

    Args:
        close: ends the run with a status.
    """

    def __init__(self, close: Callable[[Status], None]) -> None:
        self._close, self._process = close, os.getpid()
        self._user_handled = self._is_closing = False
        self._pending: int | None = None
        self._before: Any = signal.getsignal(signal.SIGTERM) if _in_main_thread() else None
        # Not if SIGTERM is ignored or handled by something that is not Python's.
        if self._before not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGTERM, self._terminate)
        atexit.register(self._leave)
        # multiprocessing ends its children without atexit.
        self._finalizer = Finalize(None, self._leave, exitpriority=10)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Holds SIGTERM back while the run is being closed, and delivers it afterwards."""
        self._is_closing = True
        try:
            yield
        finally:
            self._is_closing = False
            self.undo()
            if self._pending is not None:
                os.kill(os.getpid(), self._pending)

    def judge(self, status: Status) -> Status:
        """Returns ``stopped`` for a failure that followed a SIGTERM the user's handler took."""
        return "stopped" if self._user_handled and status == "failed" else status

    def undo(self) -> None:
        """Stops watching the exit and the signal."""
        atexit.unregister(self._leave)
        self._finalizer.cancel()
        # A handler that was installed over ours stays.
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, self._before)

    def _leave(self) -> None:
        # An uncaught exception is a failure; Ctrl-C is not.
        interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
        if os.getpid() == self._process:
            self._close("stopped" if interrupted else "failed")

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._is_closing:
            self._pending = number
            return
        if self._user_handles():
            self._user_handled = True
            self._before(number, frame)
            return
        if os.getpid() == self._process:
            self._close("stopped")
        self.undo()
        os.kill(os.getpid(), number)  # to another open run's handler, or to the default

    def _user_handles(self) -> bool:
        """Returns whether the handler below those of all open runs is the user's."""
        handler = self._before
        while isinstance(run := getattr(handler, "__self__", None), ProcessExit):
            handler = run._before
        return callable(handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

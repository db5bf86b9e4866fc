"""Ends a run also where the process is told to go: at its exit, and at SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from ulysses_monitor.patching import Undo

__all__ = ["Status", "at_the_end"]

Status = Literal["finished", "failed", "stopped"]


def at_the_end(close: Callable[[Status], None]) -> Undo:
    """Calls `close` when this process exits or gets SIGTERM, which then does what it did before.

    A forked child inherits both and must touch nothing: only the process that called this counts.
    Signals can be caught in the main thread only; elsewhere it is the exit alone.

    Returns:
        What takes it back.
    """
    return _End(close).undo


class _End:
    def __init__(self, close: Callable[[Status], None]) -> None:
        self._close, self._process = close, os.getpid()
        self._before: Any = signal.getsignal(signal.SIGTERM) if _in_main_thread() else None
        # Not where it is ignored, or belongs to what is not Python's.
        if self._before not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGTERM, self._terminate)
        atexit.register(self._leave)

    def undo(self) -> None:
        atexit.unregister(self._leave)
        if _in_main_thread():
            self._restore()

    def _leave(self) -> None:
        # An exception that nobody caught; Ctrl-C is no failure.
        interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
        self._end("stopped" if interrupted else "failed")

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._end("stopped")
        self._restore()
        if callable(self._before):
            self._before(number, frame)
        else:
            os.kill(os.getpid(), number)

    def _end(self, status: Status) -> None:
        if os.getpid() == self._process:
            self._close(status)

    def _restore(self) -> None:
        # Whoever took the signal after us keeps it.
        if signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, self._before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

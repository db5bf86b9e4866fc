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
    own = os.getpid()

    def leave() -> None:
        # An exception that nobody caught; Ctrl-C is no failure.
        interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
        if os.getpid() == own:
            close("stopped" if interrupted else "failed")

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            close("stopped")
        restore()
        if callable(previous):
            previous(number, frame)
        else:
            os.kill(os.getpid(), number)

    def restore() -> None:
        # Whoever took the signal after us keeps it.
        if in_main and signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, previous)

    in_main = threading.current_thread() is threading.main_thread()
    previous: Any = signal.getsignal(signal.SIGTERM) if in_main else None
    # Not where it is ignored, or belongs to what is not Python's.
    in_main = in_main and previous not in (signal.SIG_IGN, None)
    if in_main:
        signal.signal(signal.SIGTERM, terminate)
    atexit.register(leave)

    def undo() -> None:
        atexit.unregister(leave)
        if threading.current_thread() is threading.main_thread():
            restore()

    return undo

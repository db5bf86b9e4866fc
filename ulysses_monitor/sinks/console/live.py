"""A table that is redrawn in place, and leaves the terminal as it found it."""

from __future__ import annotations

import atexit
import time

from rich.console import Console
from rich.live import Live

from ulysses_monitor.sinks.console.state import RunState
from ulysses_monitor.sinks.console.streams import Redirection
from ulysses_monitor.sinks.console.table import StatusTable

__all__ = ["LiveTable"]

_REDRAW_SECONDS = 0.5
"""Drawing takes a few milliseconds of the interpreter."""


class LiveTable:
    """The table of a run on a terminal.

    It has no thread: whoever has news redraws it. The cursor stays visible, so that a process that
    is killed leaves a usable terminal too.

    Args:
        console: the terminal.
        state: what is drawn.
    """

    def __init__(self, console: Console, state: RunState) -> None:
        self._console = console
        self._redirection = Redirection(console)
        self._live = Live(
            StatusTable(state),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._drawn = 0.0
        atexit.register(self.stop)
        try:
            self._live.start()
            console.show_cursor(True)
            self._redirection.start()
        except BaseException:
            self.stop()
            raise

    def show(self, state: RunState) -> None:
        """Draws another state from now on."""
        self._live.update(StatusTable(state))

    def redraw(self) -> None:
        """Draws the state as it is now, unless it was drawn a moment ago."""
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._live.refresh()
            self._drawn = time.monotonic()

    def stop(self) -> None:
        """Draws a last time, below all that was printed; safe to call twice."""
        atexit.unregister(self.stop)
        try:
            self._live.stop()
        finally:
            self._redirection.stop()

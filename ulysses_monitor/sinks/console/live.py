"""A table that is redrawn in place and leaves the terminal as it was."""

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
"""Shortest time between two drawings, each of which holds the GIL for a few milliseconds."""


class LiveTable:
    """The table of a run in a terminal.

    It has no thread: the caller redraws it when there is news. The cursor stays visible, so that
    even a killed process leaves a usable terminal.

    Args:
        console: the terminal.
        state: the state to draw.
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

    def set_state(self, state: RunState) -> None:
        """Replaces the state to draw."""
        self._live.update(StatusTable(state))

    def redraw(self) -> None:
        """Draws the current state, unless the last drawing was a moment ago."""
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._live.refresh()
            self._drawn = time.monotonic()

    def stop(self) -> None:
        """Draws a last time, below everything printed; safe to call twice."""
        atexit.unregister(self.stop)
        try:
            self._live.stop()
        finally:
            self._redirection.stop()

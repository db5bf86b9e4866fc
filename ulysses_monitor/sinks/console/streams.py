"""Lets other output live with a table that is redrawn in place.

What the training prints while the table is up goes above it, line by line. Rich's own redirection
puts back whatever it found, also over a stream that somebody else has set since, reads markup in
unfinished lines, and takes output that goes to a file; this one does not.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.text import Text

__all__ = ["Redirection"]


class Redirection:
    """Sends standard output and error above a console's live table, where they are a terminal.

    Args:
        console: has the table.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._placed: list[tuple[str, TextIO, TextIO]] = []

    def start(self) -> None:
        """Puts streams in the place of the terminal's, also in handlers of logging."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _is_terminal(stream):
                above = cast("TextIO", _Above(self._console, stream))
                setattr(sys, name, above)
                self._placed.append((name, above, stream))
                _hand_over(stream, above)

    def stop(self) -> None:
        """Puts the terminal's streams back, where nobody has put others; safe to call twice."""
        while self._placed:
            name, above, stream = self._placed.pop()
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
            _hand_over(above, stream)
            above.close_line()  # type: ignore[attr-defined]


class _Above:
    """A stream that prints whole lines above the table; all else is the terminal's own."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console = console
        self._stream = stream
        self._line = ""
        self._decoder = AnsiDecoder()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def rich_proxied_file(self) -> TextIO:
        """Where rich's consoles write: not into this stream, which writes through one."""
        return self._stream

    def write(self, text: str) -> int:
        """Prints the lines that are complete."""
        with self._lock:
            lines, newline, rest = text.rpartition("\n")
            if newline:
                lines, self._line = self._line + lines, ""
                self._print(lines)
            # A bar that returns to the line's start is only worth its last state.
            self._line = (self._line + rest)[-10_000:].rpartition("\r")[2]
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """See `io.IOBase.writelines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Nothing to do: an unfinished line has no place above a table."""

    def close_line(self) -> None:
        """Prints what is left of an unfinished line."""
        with self._lock:
            line, self._line = self._line, ""
        if line:
            self._print(line)

    def _print(self, lines: str) -> None:
        shown = [line.rpartition("\r")[2] for line in lines.split("\n")]
        text = Text("\n").join(self._decoder.decode_line(line) for line in shown)
        self._console.print(text, soft_wrap=True)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty()) and not isinstance(stream, _Above)
    except (AttributeError, ValueError):  # none at all, or closed
        return False


def _hand_over(old: TextIO, new: TextIO) -> None:
    """Handlers keep the stream that they were made with, except those that look it up each time."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is old:
                handler.setStream(new)

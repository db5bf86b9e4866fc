"""Redirects other output so that it does not disturb a table that is redrawn in place.

What the training prints while the table is up goes above it, line by line. This replaces rich's own
redirection, which restores its streams even if someone else has replaced them since, reads markup
in unfinished lines, and redirects output that goes to a file.
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
    """Sends standard output and error above a live table, as far as they go to a terminal.

    Args:
        console: the console with the table.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._replaced: list[tuple[str, TextIO, TextIO]] = []

    def start(self) -> None:
        """Replaces the terminal's streams, including those of logging handlers."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _is_terminal(stream):
                above = cast("TextIO", _AboveTable(self._console, stream))
                setattr(sys, name, above)
                self._replaced.append((name, above, stream))
                _replace_in_handlers(stream, above)

    def stop(self) -> None:
        """Restores the streams, unless someone else has replaced them; safe to call twice."""
        while self._replaced:
            name, above, stream = self._replaced.pop()
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
            _replace_in_handlers(above, stream)
            above.close_line()  # type: ignore[attr-defined]


class _AboveTable:
    """A stream that prints complete lines above the table; the rest is the terminal's stream."""

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
        """The stream that rich's consoles use; this one writes through such a console."""
        return self._stream

    def write(self, text: str) -> int:
        """Prints the complete lines and keeps the rest."""
        with self._lock:
            lines, newline, rest = text.rpartition("\n")
            if newline:
                lines, self._line = self._line + lines, ""
                self._print(lines)
            # A progress bar returns to the start of its line; only its last state counts.
            self._line = (self._line + rest)[-10_000:].rpartition("\r")[2]
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """See `io.IOBase.writelines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Does nothing, because an unfinished line cannot go above the table."""

    def close_line(self) -> None:
        """Prints the unfinished line, if any."""
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
        return bool(stream.isatty()) and not isinstance(stream, _AboveTable)
    except (AttributeError, ValueError):  # there is no stream, or it is closed
        return False


def _replace_in_handlers(old: TextIO, new: TextIO) -> None:
    """Replaces a stream in logging handlers, which keep the stream that they were created with."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is old:
                handler.setStream(new)

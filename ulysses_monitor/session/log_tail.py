"""The last lines of the log, for a run that fails."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from contextlib import suppress
from typing import Any, TextIO

from ulysses_monitor.common.masking import mask_text
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["LogTail"]

_LINES, _WIDTH = 50, 400
"""Most lines to return, and most characters of each."""
_KEPT = 4_000
"""Most characters of an entry while it waits: enough to mask a secret before it is cut."""


class LogTail:
    """Keeps what was logged last, from `logging` and, if asked, from standard error.

    It sees log records as they are made, of level INFO and above. A handler would change what the
    user's own program logs: `logging.basicConfig` does nothing once there is one.
    """

    def __init__(self) -> None:
        self._entries: deque[str] = deque(maxlen=_LINES)
        self._line = ""
        self._thread = threading.get_ident()
        self._undos: list[Undo] = []

    def start(self) -> None:
        """Keeps what is logged from now on, until `stop`."""
        self._undos.append(self._follow_logging())

    def follow(self, stream: TextIO | None) -> None:
        """Also keeps what this thread writes to `stream`, until `stop`; nothing else changes."""

        def write(original: Any, text: str, *args: Any, **kwargs: Any) -> Any:
            written = original(text, *args, **kwargs)
            # The table of the console sink is written by another thread.
            if threading.get_ident() == self._thread:
                with suppress(Exception):
                    self._add_written(text)
            return written

        with suppress(AttributeError, TypeError):  # a stream that takes no attributes
            self._undos.append(patch_method(stream, "write", write))

    def stop(self) -> None:
        """Leaves logging and streams as they were."""
        undo_all(self._undos)

    def lines(self) -> list[str]:
        """Returns the last lines, oldest first, with secrets masked."""
        last = self._line.rpartition("\r")[2]
        text = "\n".join([*self._entries, *([last] if last.strip() else [])])
        lines = [mask_text(line) for line in text.splitlines()[-_LINES:]]
        return [line if len(line) <= _WIDTH else f"{line[:_WIDTH]}..." for line in lines]

    def _follow_logging(self) -> Undo:
        before, is_active = logging.getLogRecordFactory(), True

        def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = before(*args, **kwargs)
            if is_active:
                with suppress(Exception):  # a message that does not fit its arguments
                    self._add_record(record)
            return record

        def undo() -> None:
            nonlocal is_active
            is_active = False
            if logging.getLogRecordFactory() is make:
                logging.setLogRecordFactory(before)

        logging.setLogRecordFactory(make)
        return undo

    def _add_record(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.INFO:
            return
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + "".join(traceback.format_exception_only(record.exc_info[1])).rstrip()
        self._entries.append(text[:_KEPT])

    def _add_written(self, text: str) -> None:
        *ended, self._line = (self._line + text).split("\n")
        self._line = self._line[-_KEPT:]
        if not ended:
            return
        logged = {line for entry in self._entries for line in entry.splitlines()}
        for line in ended:
            shown = line.rstrip("\r").rpartition("\r")[2]  # what a progress bar left
            is_logged = any(shown.endswith(each.partition(": ")[2] or each) for each in logged)
            if shown.strip() and not is_logged:
                self._entries.append(shown[:_KEPT])

"""Keeps a failure of the monitor, or of what a user handed to it, away from the training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ulysses_monitor.common.errors import TrainingStoppedError

__all__ = ["MAX_FAILURES", "Guard"]

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures after which a part is switched off."""

_T = TypeVar("_T")
_D = TypeVar("_D")


class Guard:
    """Calls parts that run inside the user's training; a part that raises costs itself only.

    The first failure of a part is logged with its traceback. After `MAX_FAILURES` failures the part
    is switched off. Both are reported once, for the run's events.

    Args:
        report: receives what happened to a part: ``part``, ``state`` (``failed`` or ``off``) and
            ``error``.
    """

    def __init__(self, report: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self._report = report
        self._reported: set[str] = set()
        self.failures: Counter[str] = Counter()

    def is_off(self, part: str) -> bool:
        """Returns whether `part` failed too often to be called again."""
        return self.failures[part] >= MAX_FAILURES

    def call(
        self, part: str, function: Callable[[], _T], default: _D, *, stays_on: bool = False
    ) -> _T | _D:
        """Calls `function` unless `part` is off.

        Args:
            part: the name in messages, such as ``policy zclip``.
            function: what to call.
            default: the result where the part is off or raises.
            stays_on: never switch the part off, because other ranks may wait for what it does.
        """
        if self.is_off(part):
            return default
        try:
            return function()
        except TrainingStoppedError:  # a rule or a policy asked for it
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the guard logs it
            if stays_on:
                self.report_failure(part, error)
            else:
                self.note_failure(part, error)
            return default

    def note_failure(self, part: str, error: BaseException, *, is_last: bool = False) -> None:
        """Reports and counts a failure of `part`.

        Args:
            part: the name in messages.
            error: what the part raised.
            is_last: switch the part off at once.
        """
        self.report_failure(part, error)
        if is_last:
            self.failures[part] = MAX_FAILURES - 1
        self.count_failure(part, _reason(error))

    def report_failure(self, part: str, error: BaseException) -> None:
        """Logs and reports a failure of `part` if it is the first one; does not count it."""
        if part not in self._reported:
            self._reported.add(part)
            logger.error("monitor: %s failed; training continues", part, exc_info=error)
            self._tell(part, "failed", _reason(error))

    def count_failure(self, part: str, reason: str) -> None:
        """Counts a failure of `part` and switches it off if it failed too often."""
        self.failures[part] += 1
        if self.failures[part] == MAX_FAILURES:
            logger.error("monitor: %s is switched off: %s", part, reason)
            self._tell(part, "off", reason)

    def _tell(self, part: str, state: str, reason: str) -> None:
        if self._report is not None:
            self._report({"part": part, "state": state, "error": reason})


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

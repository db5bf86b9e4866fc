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
        if self.is_off(part) and not stays_on:
            return default
        try:
            return function()
        except TrainingStoppedError:  # a rule or a policy asked for it
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - note_failure logs it
            self.note_failure(part, error, stays_on=stays_on)
            return default

    def note_failure(
        self, part: str, error: BaseException, *, is_last: bool = False, stays_on: bool = False
    ) -> None:
        """Counts a failure of `part`; call it from the ``except`` clause that caught `error`.

        Args:
            part: the name in messages.
            error: what the part raised.
            is_last: switch the part off at once.
            stays_on: the part is not switched off.
        """
        self.failures[part] += 1
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if self.failures[part] == 1:
            logger.error("monitor: %s failed; training continues", part, exc_info=error)
            self._tell(part, "failed", reason)
        if is_last:
            self.failures[part] = max(self.failures[part], MAX_FAILURES)
        if self.failures[part] == MAX_FAILURES and not stays_on:
            logger.error("monitor: %s is switched off: %s", part, reason)
            self._tell(part, "off", reason)

    def _tell(self, part: str, state: str, reason: str) -> None:
        if self._report is not None:
            self._report({"part": part, "state": state, "error": reason})

"""Tracks whether a sink works, and when to retry one that does not."""

from __future__ import annotations

from typing import Literal

__all__ = ["MAX_FAILURES", "Health"]

MAX_FAILURES = 5
"""Failures in a row after which a sink is switched off until it is retried."""

_SHORT_PAUSE, _FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0, 300.0
"""Seconds before a retry: of a failing sink, of one that was just switched off, and at most."""

_CLOSING_PAUSE = 0.2
"""Longest pause, in seconds, while the run is ending."""

Change = Literal["failed", "off", "on"]


class Health:
    """Counts failures in a row of each method; switches off after `MAX_FAILURES`.

    Pauses between retries double while the sink is off.

    Attributes:
        is_off: whether the sink is switched off.
    """

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}
        self._pause, self._longest = _SHORT_PAUSE, _LONGEST_PAUSE
        self._retry_at = 0.0
        self.is_off = False

    def count_failure(self, method: str, now: float) -> Change | None:
        """Counts a failure.

        Args:
            method: the sink's method that failed.
            now: monotonic seconds.

        Returns:
            ``failed`` or ``off`` if the change deserves a message, else None.
        """
        count = self._in_a_row[method] = self._in_a_row.get(method, 0) + 1
        change: Change | None = "failed" if count == 1 and not self.is_off else None
        if self.is_off:
            self._pause = min(2 * self._pause, self._longest)
        elif count == MAX_FAILURES:
            self.is_off, self._pause, change = True, _FIRST_PAUSE, "off"
        self._retry_at = now + self._pause
        return change

    def count_success(self, method: str) -> Change | None:
        """Counts a success; returns ``on`` if the sink was off until now, else None."""
        self._in_a_row.pop(method, None)
        if self._in_a_row or not self.is_off:
            return None
        self.is_off, self._pause = False, _SHORT_PAUSE
        return "on"

    def is_failing(self, method: str) -> bool:
        """Returns whether the method's last call failed."""
        return method in self._in_a_row

    def retry_soon(self) -> None:
        """Retries immediately and often from now on, because the run is ending."""
        self._retry_at, self._pause, self._longest = 0.0, _SHORT_PAUSE, _CLOSING_PAUSE

    def pause(self, now: float) -> float:
        """Returns the seconds to wait before the next call."""
        return max(0.0, self._retry_at - now) if self._in_a_row else 0.0

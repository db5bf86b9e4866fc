"""Whether a sink works, and when to try again one that does not."""

from __future__ import annotations

from typing import Literal

__all__ = ["MAX_FAILURES", "Health"]

MAX_FAILURES = 5
"""Failures in a row after which a sink is off until it is tried again."""

_SHORT_PAUSE, _FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0, 300.0
"""Seconds: between failures, once it is off, and after many tries."""

_HURRIED_PAUSE = 0.2

Change = Literal["failed", "off", "on"]


class Health:
    """Counts failures in a row of each method; off after `MAX_FAILURES`, with doubling pauses.

    Attributes:
        is_off: whether it is switched off.
    """

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}
        self._pause, self._longest = _SHORT_PAUSE, _LONGEST_PAUSE
        self._retry_at = 0.0
        self.is_off = False

    def failed(self, method: str, now: float) -> Change | None:
        """Counts a failure at `now`, monotonic seconds; what is worth a message, if anything."""
        count = self._in_a_row[method] = self._in_a_row.get(method, 0) + 1
        change: Change | None = "failed" if count == 1 and not self.is_off else None
        if self.is_off:
            self._pause = min(2 * self._pause, self._longest)
        elif count == MAX_FAILURES:
            self.is_off, self._pause, change = True, _FIRST_PAUSE, "off"
        self._retry_at = now + self._pause
        return change

    def succeeded(self, method: str) -> Change | None:
        """Counts a success; `on` where the sink had been off."""
        self._in_a_row.pop(method, None)
        if self._in_a_row or not self.is_off:
            return None
        self.is_off, self._pause = False, _SHORT_PAUSE
        return "on"

    def is_failing(self, method: str) -> bool:
        """Whether the method's last call failed."""
        return method in self._in_a_row

    def retry_soon(self) -> None:
        """Tries again at once and often: there is no later."""
        self._retry_at, self._pause, self._longest = 0.0, _SHORT_PAUSE, _HURRIED_PAUSE

    def pause(self, now: float) -> float:
        """Seconds to leave the sink alone."""
        return max(0.0, self._retry_at - now) if self._in_a_row else 0.0

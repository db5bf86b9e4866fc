"""Why a run failed, what was logged last, and how much memory it took."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ulysses_monitor.common.memory import host_peak_bytes
from ulysses_monitor.session.log_tail import LogTail

__all__ = ["FailureWatch", "peak_memory"]


class FailureWatch:
    """Knows the exception that ended a training, as far as anybody tells, and the last log lines.

    A plain loop tells it. A Trainer does not; then it is the exception that is being handled, or
    the last one that nobody in this process caught, if that was raised after the run began.

    Attributes:
        log: keeps the last lines of the log until `finish`.
    """

    def __init__(self) -> None:
        self.log = LogTail()
        self._error: str | None = None
        self._before = _known_exceptions()

    def note(self, error: BaseException) -> None:
        """Keeps type and message of `error`, and none of what its traceback holds."""
        self._error = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")

    def finish(self, status: str) -> dict[str, Any]:
        """Stops watching and returns ``error`` and ``log`` of a run that failed, as far as known.

        Call it once.
        """
        self.log.stop()
        before, self._before = self._before, []
        if status != "failed":
            return {}
        for error in _known_exceptions():
            if self._error is None and not any(error is each for each in before):
                self.note(error)
        found = {"error": self._error, "log": self.log.lines()}
        return {name: value for name, value in found.items() if value}


def _known_exceptions() -> list[BaseException]:
    known = (sys.exception(), getattr(sys, "last_value", None))
    return [error for error in known if error is not None]


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Returns the largest memory of this process so far, in bytes: ``host``, and ``device``."""
    peak = {"host": int(host_peak_bytes())}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak

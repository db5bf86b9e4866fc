"""Why a run failed, and how much memory it took."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

__all__ = ["FailureWatch", "peak_memory"]

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of ``ru_maxrss``."""


class FailureWatch:
    """Knows the exception that ended a training, as far as anybody tells.

    A plain loop tells it. A Trainer does not; then it is the last exception that nobody in this
    process caught, if that was raised after the run began.
    """

    def __init__(self) -> None:
        self._error: str | None = None
        self._before = _last_uncaught()

    def note(self, error: BaseException) -> None:
        """Keeps type and message of `error`, and none of what its traceback holds."""
        self._error = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")

    def describe(self) -> str | None:
        """Returns type and message of the exception, None if there is none; call it once."""
        last, before = _last_uncaught(), self._before
        self._before = None
        if self._error is None and last is not None and last is not before:
            self.note(last)
        return self._error


def _last_uncaught() -> BaseException | None:
    return getattr(sys, "last_value", None)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Returns the largest memory of this process so far, in bytes: ``host``, and ``device``."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak

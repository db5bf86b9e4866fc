"""The project's own errors: what is raised on purpose, so that callers can tell it from a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "TrainingStoppedError", "UlyssesError", "nearest"]


class UlyssesError(Exception):
    """Base of every error that this project raises on purpose."""


class InputError(UlyssesError):
    """The user's input is wrong: the message says what, where, and what is allowed, in one line."""


class TrainingStoppedError(UlyssesError):
    """A rule or a policy asked for the run to stop."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for the name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""The project's own errors: raised on purpose, so that callers can tell them from bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "TrainingStoppedError", "UlyssesError", "nearest"]


class UlyssesError(Exception):
    """Base of every error that this project raises on purpose."""


class InputError(UlyssesError):
    """The user's input is wrong.

    The message says in one line where the input is, what it is, and what is allowed:
    ``<where>: <setting> is <value>; expected <what>``, or ``allowed: a, b, c`` for closed sets.
    """


class TrainingStoppedError(UlyssesError):
    """A rule or a policy stopped the run."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for the name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""

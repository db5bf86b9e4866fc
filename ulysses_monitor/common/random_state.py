"""Leaves Python's global random numbers to the user's script."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_random_state"]


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Puts the state of Python's `random` back, for code that draws from it, such as rich's import.

    A seeded script would otherwise get other numbers with the monitor than without it.
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)

"""Whether a step is computed again just now, so that hooks take nothing of it for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["computing_again", "is_computing_again"]

_FLAG = ContextVar("computing_again", default=False)


@contextmanager
def computing_again() -> Iterator[None]:
    """Marks the calls of a model inside as a repetition of calls that were seen before."""
    token = _FLAG.set(True)
    try:
        yield
    finally:
        _FLAG.reset(token)


def is_computing_again() -> bool:
    """Returns whether the call that is made now repeats one."""
    return _FLAG.get()

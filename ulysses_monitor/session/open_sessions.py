"""The sessions that are open in this process, for what logs without one at hand."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ulysses_monitor.session.session import Session

__all__ = ["latest_session", "note_open"]

_opened: list[weakref.ref[Session]] = []


def note_open(session: Session) -> None:
    """Notes that `session` was opened; it need not say when it closes."""
    _opened[:] = [known for known in _opened if (s := known()) is not None and s.is_open]
    _opened.append(weakref.ref(session))


def latest_session() -> Session | None:
    """Returns the session that was opened last and is still open."""
    sessions = [known() for known in reversed(_opened)]
    return next((s for s in sessions if s is not None and s.is_open), None)

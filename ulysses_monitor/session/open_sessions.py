"""The sessions of this process that still record, of whichever monitor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

from ulysses_monitor.engines import Engine
from ulysses_monitor.session.naming import choose_run_dir
from ulysses_monitor.session.opening import Training
from ulysses_monitor.session.places import Place
from ulysses_monitor.session.session import Session
from ulysses_monitor.session.settings import MonitorSettings, Parts, WhenTaken

__all__ = ["choose_first_dir", "latest_session", "start_session"]

_opened: list[ref[Session]] = []
"""In the order in which they were opened."""


def choose_first_dir(run_dir: str | Path | None, if_exists: WhenTaken) -> Path:
    """Returns what `choose_run_dir` does; a run that this process left open takes no directory.

    Raises:
        InputError: see `choose_run_dir`.
    """
    is_ours = run_dir is not None and bool(_find(Path(run_dir)))
    return choose_run_dir(run_dir, "new" if is_ours else if_exists)


def start_session(
    place: Place,
    settings: MonitorSettings,
    parts: Parts,
    engine: Engine,
    training: Training,
    config: Mapping[str, Any],
) -> Session:
    """Opens a session; ends first what an earlier monitor left open in a run to continue.

    That happens if a notebook cell was interrupted and is run again.

    Raises:
        InputError: see `Session`.
    """
    if place.if_exists in ("resume", "overwrite"):
        for left_open in _find(place.run_dir):
            left_open.close("failed")
    session = Session(place, settings, parts, engine, training, config)
    _opened[:] = [ref(each) for each in [*_list_open(), session]]
    return session


def latest_session() -> Session | None:
    """Returns the session that was opened last and is still open."""
    return next(reversed(_list_open()), None)


def _find(run_dir: Path) -> list[Session]:
    path = run_dir.absolute()
    return [session for session in _list_open() if session.run_dir.absolute() == path]


def _list_open() -> list[Session]:
    return [session for known in _opened if (session := known()) is not None and session.is_open]

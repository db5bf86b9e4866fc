"""Which run directory a training of an attached command gets.

The first gets the one that the user named, the others that name with ``-2``, ``-3``, ...: one
script may train several times, and one command may start several scripts. What is taken is read
from the directories themselves, which every process sees; only rank 0 writes, so only it asks.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ulysses_monitor.integrations.auto.settings import Settings
from ulysses_monitor.store import IfExists, check_free, holds_run, is_locked

__all__ = ["check_first_place", "choose_place", "origin"]


def origin(settings: Settings, output_dir: str) -> dict[str, str]:
    """What a run keeps in run.json, to be found again: no path but the Trainer's own."""
    return {
        "first": settings.run_dir.name,
        "session": settings.session,
        "output_dir": output_dir,
    }


def choose_place(settings: Settings, output_dir: str, step: int) -> tuple[Path, IfExists]:
    """The run directory for a training that begins, and what to do with a run in it.

    Args:
        settings: of this command.
        output_dir: the Trainer's; by it a training that goes on is known again.
        step: optimizer steps already done; more than 0 where it goes on from a checkpoint.
    """
    if step and (known := _last_of(settings, output_dir)) is not None:
        return known, "resume"
    places = (place for place in _places(settings.run_dir) if _is_free(place, settings))
    return next(places), settings.if_exists


def check_first_place(path: Path, if_exists: IfExists) -> None:
    """Refuses a run directory before anything is started, touching nothing.

    Raises:
        InputError: it is in use, holds a run, or cannot be written.
    """
    ways = "or give --if-exists resume to continue it, or --if-exists overwrite to replace it"
    check_free(path, if_exists, where="--run-dir", ways=ways)


def _places(first: Path) -> Iterator[Path]:
    yield first
    for number in itertools.count(2):
        yield first.with_name(f"{first.name}-{number}")


def _is_free(place: Path, settings: Settings) -> bool:
    """Whether a new training may be recorded there, so that no other run is harmed."""
    if not place.exists():
        return True
    if not place.is_dir() or is_locked(place):
        return False
    if not holds_run(place):
        return True
    if settings.if_exists == "refuse":
        return False
    run = _origin_of(place)
    if run.get("session") == settings.session:  # recorded a moment ago, by this very command
        return False
    # `demo-2` may be somebody's experiment; only `demo` itself was named by the user.
    return place == settings.run_dir or run.get("first") == settings.run_dir.name


def _last_of(settings: Settings, output_dir: str) -> Path | None:
    """The latest run of the training that writes to `output_dir`."""
    places = itertools.takewhile(Path.exists, _places(settings.run_dir))
    runs = [(place, _origin_of(place)) for place in places]
    own = [
        place
        for place, run in runs
        if run.get("output_dir") == output_dir
        and run.get("first") == settings.run_dir.name
        and (run.get("session") == settings.session or settings.if_exists == "resume")
        and not is_locked(place)
    ]
    return own[-1] if own else None


def _origin_of(place: Path) -> Mapping[str, Any]:
    """What `origin` left in the run's run.json; nothing where it is not an attached run."""
    try:
        run = json.loads((place / "run.json").read_text())
        found = run["config"]["attach"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}

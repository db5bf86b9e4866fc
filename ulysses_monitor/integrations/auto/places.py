"""Which run directory each training of an attached command gets.

The first gets the one that the user named, the others that name with ``-2``, ``-3``, ...: one
script may train several times, and one command may start several scripts. Which directories are
taken is read from the directories themselves, which every process sees; only rank 0 writes, so only
rank 0 asks.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_monitor.integrations.auto.settings import AttachSettings
from ulysses_monitor.session.places import Place, is_free, numbered_dirs
from ulysses_monitor.session.settings import WhenTaken
from ulysses_monitor.store import check_available, check_writable, holds_run, is_locked

__all__ = ["check_first_place", "choose_place", "origin"]


def origin(settings: AttachSettings, output_dir: str) -> dict[str, str]:
    """Returns what run.json keeps to find the run again; no path but the Trainer's own."""
    return {
        "first": settings.run_dir.name,
        "session": settings.command_id,
        "output_dir": output_dir,
    }


def choose_place(settings: AttachSettings, output_dir: str, step: int) -> Place:
    """Chooses the run directory for a training that begins.

    Args:
        settings: of this command.
        output_dir: the Trainer's; it identifies a training that resumes.
        step: optimizer steps already done; more than 0 if the training resumes.
    """
    if step and (known := _last_of(settings, output_dir)) is not None:
        return Place(known, "resume")
    free = (path for path in numbered_dirs(settings.run_dir) if _is_free(path, settings))
    if_exists = settings.monitor.if_exists
    return Place(next(free), "new" if if_exists == "refuse" else if_exists)


def check_first_place(path: Path, if_exists: WhenTaken) -> Path:
    """Refuses a run directory before anything is started, touching nothing.

    Returns:
        Where the first training will be recorded; beside `path` if that is taken.

    Raises:
        InputError: it cannot be written, or it is taken and `if_exists` is not ``new``.
    """
    if if_exists == "new":
        check_writable(path, where="--run-dir")
        return next(filter(is_free, numbered_dirs(path)))
    ways = "or give --if-exists resume to continue it, or --if-exists overwrite to replace it"
    check_available(path, if_exists, where="--run-dir", ways=ways)
    return path


def _is_free(place: Path, settings: AttachSettings) -> bool:
    """Whether a new training may be recorded there, so that no other run is harmed."""
    if is_free(place):
        return True
    if settings.monitor.if_exists in ("new", "refuse"):
        return False
    if not holds_run(place) or is_locked(place):
        return False
    run = _origin_of(place)
    if run.get("session") == settings.command_id:  # recorded a moment ago, by this very command
        return False
    # `demo-2` may be somebody's experiment; only `demo` itself was named by the user.
    return place == settings.run_dir or run.get("first") == settings.run_dir.name


def _last_of(settings: AttachSettings, output_dir: str) -> Path | None:
    """The latest run of the training that writes to `output_dir`."""
    places = itertools.takewhile(Path.exists, numbered_dirs(settings.run_dir))
    runs = [(place, _origin_of(place)) for place in places]
    own = [
        place
        for place, run in runs
        if run.get("output_dir") == output_dir
        and run.get("first") == settings.run_dir.name
        and (run.get("session") == settings.command_id or settings.monitor.if_exists == "resume")
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

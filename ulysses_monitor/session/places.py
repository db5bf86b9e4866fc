"""Which run directory each training gets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import broadcast_bytes, rank
from ulysses_monitor.session.settings import WhenTaken
from ulysses_monitor.store import IfExists, holds_run, is_locked

__all__ = [
    "NUMBERED_AFTER",
    "Place",
    "choose_place",
    "claim",
    "is_free",
    "numbered_dirs",
]

NUMBERED_AFTER = "numbered_after"
"""The entry of run.json with the name that the user gave, where the run got a number."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """Where a session records, and what it does with a run that is there already."""

    run_dir: Path
    if_exists: WhenTaken


def choose_place(
    first: Path,
    if_exists: WhenTaken,
    *,
    previous: Path | None,
    step: int,
    info: Mapping[str, Any],
    device: torch.device,
) -> Place:
    """Chooses where a training of a monitor records; every rank calls it.

    A training that resumes from a checkpoint continues the run that it was recorded in. The others
    follow `if_exists`, except that later trainings of one monitor never touch an earlier run unless
    the user asked to resume.

    Args:
        first: the run directory that the user named.
        if_exists: what the user wants where a run is there already.
        previous: the run directory of the training before; None for the first.
        step: optimizer steps already done; more than 0 if the training resumes.
        info: what is known of the training. In a new process, where it keeps its checkpoints tells
            which run it continues.
        device: where the collective backend's tensors live.
    """
    resumes = step > 0
    if previous is not None:
        continues = resumes or if_exists == "resume"
        return Place(previous, "resume") if continues else Place(first, "new")
    if not resumes:
        return Place(first, if_exists)
    path = _find_resumed(first, _output_dir(info)) if rank() == 0 else first
    return Place(Path(broadcast_bytes(str(path).encode(), device).decode()), "resume")


def claim(place: Place, take: Callable[[Path, IfExists], _T]) -> _T:
    """Takes the directory of `place`, or the first free one of ``-2``, ``-3``, ... beside it.

    It goes to a number if `place` asks for a new directory, or if another training still writes
    the one to continue or replace. So a training never fails because a directory is taken, unless
    the user asked to refuse that.

    Args:
        place: where to record.
        take: opens a directory; another process may take it a moment earlier.

    Raises:
        InputError: the directory cannot be used, for any other reason.
    """
    path, if_exists = place.run_dir, place.if_exists
    if if_exists == "refuse" or (if_exists != "new" and not is_locked(path)):
        return take(path, if_exists)
    for path in filter(is_free, numbered_dirs(place.run_dir)):
        try:
            return take(path, "refuse")
        except InputError:
            if is_free(path):  # then something else is wrong
                raise
    raise AssertionError("numbered_dirs() ended")


def numbered_dirs(first: Path) -> Iterator[Path]:
    """Yields ``first``, ``first-2``, ``first-3``, ..."""
    yield first
    for number in itertools.count(2):
        yield first.with_name(f"{first.name}-{number}")


def is_free(path: Path) -> bool:
    """Returns whether a new run can be recorded at `path` without harm to another."""
    if not path.exists():
        return True
    return path.is_dir() and not is_locked(path) and not holds_run(path)


def _find_resumed(first: Path, output_dir: str | None) -> Path:
    """Returns the latest run that was meant for `first` and has this `output_dir`."""
    found = first
    for path in itertools.takewhile(Path.exists, numbered_dirs(first)):
        info = _read_info(path)
        is_ours = path == first or info.get(NUMBERED_AFTER) == first.name
        if is_ours and _output_dir(info) == output_dir:
            found = path
    return found


def _output_dir(info: Mapping[str, Any]) -> Any:
    arguments = info.get("training_arguments")
    return arguments.get("output_dir") if isinstance(arguments, Mapping) else None


def _read_info(path: Path) -> Mapping[str, Any]:
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, Mapping) else {}

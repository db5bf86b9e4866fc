"""What a run can be read from: a run directory, TensorBoard files, a Trainer's state."""

from __future__ import annotations

import os
import posixpath

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.sources.base import Source
from ulysses_monitor.reading.sources.directory import DirectorySource
from ulysses_monitor.reading.sources.tensorboard import (
    TensorBoardSource,
    event_files,
    folders_with_events,
)
from ulysses_monitor.reading.sources.trainer_state import TrainerStateSource, find_trainer_state
from ulysses_monitor.store import Location

__all__ = [
    "DirectorySource",
    "Source",
    "TensorBoardSource",
    "TrainerStateSource",
    "find_source",
    "folders_with_events",
    "source_at",
]

_MOST_NAMED = 8


def find_source(place: str | os.PathLike[str]) -> Source:
    """The source of the run at a path or URL.

    Raises:
        InputError: there is no run there, or there are several.
    """
    location = Location.of(place)
    try:
        source = source_at(location)
        below = [] if source else folders_with_events(location)
    except OSError as error:
        raise InputError(f"run {place}: cannot be read: {error}") from None
    if source is not None:
        return source
    if below:
        runs = [posixpath.relpath(run.path, location.path) for run in below]
        more = f" and {len(runs) - _MOST_NAMED} more" if len(runs) > _MOST_NAMED else ""
        raise InputError(
            f"run {place}: holds {len(runs)} TensorBoard runs; "
            f"name one of {', '.join(runs[:_MOST_NAMED])}{more}"
        )
    raise InputError(
        f"run {place}: no run.json there; name a run directory such as runs/sft, a folder of "
        "TensorBoard event files, or a Trainer's output_dir with trainer_state.json"
    )


def source_at(location: Location) -> Source | None:
    """The source of the run that is a file or folder, None where it is no run."""
    if location.is_file():
        return _source_in_file(location)
    if (location / "run.json").is_file():
        return DirectorySource(location)
    if event_files(location):
        return TensorBoardSource(location)
    if find_trainer_state(location) is not None:
        return TrainerStateSource(location)
    return None


def _source_in_file(file: Location) -> Source | None:
    folder = Location(file.filesystem, posixpath.dirname(file.path))
    if "tfevents" in file.name:
        return TensorBoardSource(folder, only=file.name)
    if file.name == "run.json":
        return DirectorySource(folder)
    return TrainerStateSource(folder, file) if file.name.endswith("trainer_state.json") else None

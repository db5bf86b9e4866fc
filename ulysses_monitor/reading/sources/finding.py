"""Finds out what a path or URL holds: a run directory, TensorBoard files or a Trainer's state."""

from __future__ import annotations

import os
import posixpath

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.sources.base import Source
from ulysses_monitor.reading.sources.directory import DirectorySource
from ulysses_monitor.reading.sources.tensorboard import (
    TensorBoardSource,
    find_event_folders,
    list_event_files,
)
from ulysses_monitor.reading.sources.trainer_state import TrainerStateSource, find_trainer_state
from ulysses_monitor.store import Location

__all__ = ["find_source", "source_at"]

_MAX_NAMED = 8


def find_source(place: str | os.PathLike[str]) -> Source:
    """Returns the source of the run at a path or URL.

    Raises:
        InputError: there is no run at `place`, or there are several.
    """
    location = Location.of(place)
    try:
        source = source_at(location)
        below = [] if source else find_event_folders(location)
    except OSError as error:
        raise InputError(f"run {place}: cannot be read: {error}") from None
    if source is not None:
        return source
    if below:
        names = [posixpath.relpath(folder.path, location.path) for folder in below]
        raise InputError(
            f"run {place}: holds {len(names)} TensorBoard runs; expected one: {_join(names)}"
        )
    raise InputError(
        f"run {place}: no run.json there; expected a run directory such as runs/sft, a folder of "
        "TensorBoard event files, or a Trainer's output_dir with trainer_state.json"
    )


def _join(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def source_at(location: Location) -> Source | None:
    """Returns the source of the run in a file or folder, or None if it is not a run."""
    if location.is_file():
        return _source_in_file(location)
    if (location / "run.json").is_file():
        return DirectorySource(location)
    if list_event_files(location):
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

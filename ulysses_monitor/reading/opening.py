"""Finds the runs in a folder, by a glob, or in a list of paths and URLs."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.reader import RunReader, open_run
from ulysses_monitor.reading.run_set import RunSet
from ulysses_monitor.reading.sources import (
    Source,
    TensorBoardSource,
    folders_with_events,
    source_at,
)
from ulysses_monitor.store import Location

__all__ = ["open_runs"]

Place = str | os.PathLike[str]

_LEFT_BY_A_RUN = {"metrics", "events.jsonl"}


def open_runs(places: Place | Iterable[Place]) -> RunSet:
    """Opens many runs.

    Args:
        places: a folder of runs, or a single run; a glob such as ``"runs/sft-*"`` or
            ``"s3://bucket/runs/*/seed-*"``; or a list of runs, each as in `open_run`.

    Raises:
        InputError: there is no such folder, nothing matches, or one of a list is no run.
    """
    if isinstance(places, str | os.PathLike):
        problems: dict[str, str] = {}
        runs = [RunReader(source, source.folder.local) for source in _sources(places, problems)]
        return RunSet(_named(runs), problems)
    return RunSet(_named([open_run(place) for place in places]))


def _named(runs: list[RunReader]) -> dict[str, RunReader]:
    """Runs by their folders' names, by their places where two are alike."""
    alike = Counter(run.location.name for run in runs)
    return {
        run.location.name if alike[run.location.name] == 1 else str(run.location): run
        for run in runs
    }


def _sources(place: Place, problems: dict[str, str]) -> Iterator[Source]:
    """The runs at `place`; what should be one and is none goes to `problems`."""
    try:
        locations = _candidates(place)
    except OSError as error:
        raise InputError(f"runs in {place}: cannot be read: {error}") from None
    for location in locations:
        try:
            found = list(_sources_at(location))
            if not found and _LEFT_BY_A_RUN & set(location.children()):
                problems[str(location)] = "no run.json there"
        except OSError as error:
            problems[str(location)] = f"cannot be read: {error}"
        else:
            yield from found


def _candidates(place: Place) -> list[Location]:
    """What may be a run: the folder itself, what is in it, or what the glob matches."""
    location = Location.of(place)
    filesystem, path = location.filesystem, location.path
    if filesystem.isdir(path):
        if source_at(location) is not None:
            return [location]
        children = [location / name for name in location.children() if not name.startswith(".")]
        return [child for child in children if not child.is_file()]
    if glob.has_magic(path):
        if found := filesystem.glob(path):
            return [Location(filesystem, match) for match in sorted(found)]
        raise InputError(f"runs in {place}: nothing matches")
    if location.is_file():
        return [location]
    raise InputError(f"runs in {place}: no such folder; name a folder of runs, a glob or a list")


def _sources_at(location: Location) -> Iterator[Source]:
    """The run there, or those that TensorBoard files below make."""
    source = source_at(location)
    if source is not None:
        yield source
    elif not location.is_file():
        for below in folders_with_events(location):
            yield TensorBoardSource(below)

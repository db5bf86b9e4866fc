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
    find_event_folders,
    source_at,
)
from ulysses_monitor.store import Location

__all__ = ["open_runs"]

Place = str | os.PathLike[str]

_PARTS_OF_A_RUN = {"metrics", "events.jsonl"}


def open_runs(places: Place | Iterable[Place]) -> RunSet:
    """Opens many runs.

    Args:
        places: a folder of runs, or a single run; a glob such as ``"runs/sft-*"`` or
            ``"s3://bucket/runs/*/seed-*"``; or a list of runs, each as in `open_run`.

    Returns:
        The runs; `RunSet.problems` names what looks like a run and cannot be opened.

    Raises:
        InputError: the folder does not exist, the glob matches nothing, or an item of the list is
            not a run.
    """
    if isinstance(places, str | os.PathLike):
        problems: dict[str, str] = {}
        found = _find_sources(places, problems)
        runs = [RunReader(source, source.folder.local) for source in found]
        return RunSet(_name_runs(runs), problems)
    return RunSet(_name_runs([open_run(place) for place in places]))


def _name_runs(runs: list[RunReader]) -> dict[str, RunReader]:
    """Names each run after its folder, or after its place if folders share a name."""
    uses = Counter(run.location.name for run in runs)
    return {
        run.location.name if uses[run.location.name] == 1 else str(run.location): run
        for run in runs
    }


def _find_sources(place: Place, problems: dict[str, str]) -> Iterator[Source]:
    """Yields the runs at `place`; adds to `problems` what looks like a run and is not one."""
    try:
        candidates = _list_candidates(place)
    except OSError as error:
        raise InputError(f"runs in {place}: cannot be read: {error}") from None
    for location in candidates:
        try:
            found = list(_sources_below(location))
            if not found and _PARTS_OF_A_RUN & set(location.children()):
                problems[str(location)] = "run.json is missing"
        except OSError as error:
            problems[str(location)] = f"cannot be read: {error}"
        else:
            yield from found


def _list_candidates(place: Place) -> list[Location]:
    """Lists what may be a run: the folder itself, its children, or what the glob matches."""
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
        raise InputError(f"runs in {place}: nothing matches this glob; expected one or more runs")
    if location.is_file():
        return [location]
    raise InputError(
        f"runs in {place}: no such folder; expected a folder of runs, a glob or a list"
    )


def _sources_below(location: Location) -> Iterator[Source]:
    """Yields the run at `location`, or else the folders of TensorBoard files below it."""
    source = source_at(location)
    if source is not None:
        yield source
    elif not location.is_file():
        for folder in find_event_folders(location):
            yield TensorBoardSource(folder)

"""A folder of TensorBoard event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ulysses_monitor.reading.sources.base import Points, lay_out
from ulysses_monitor.reading.sources.records import find_frames, sound
from ulysses_monitor.records.trainer_names import assign_names, tag_name
from ulysses_monitor.store import Block, Location

__all__ = ["TensorBoardSource", "event_files", "folders_with_events"]

_MARK = "tfevents"
_DEEPEST = 4


def event_files(folder: Location) -> list[str]:
    """Names of the folder's event files, oldest first: their names begin with their time."""
    return [name for name in folder.children() if _MARK in name]


def folders_with_events(folder: Location) -> list[Location]:
    """Folders below `folder` that hold event files."""
    found = folder.filesystem.find(folder.path, maxdepth=_DEEPEST)
    files = [str(path).rpartition("/") for path in found]
    parents = dict.fromkeys(parent for parent, _, name in files if _MARK in name)
    return [Location(folder.filesystem, parent) for parent in sorted(parents)]


class TensorBoardSource:
    """Reads scalars of event files; each call reads only what they have grown by.

    Tags that a Trainer writes (``train/loss``) have the names of this project; all others are kept.

    Args:
        folder: holds the event files.
        only: the one file to read; all if None.
    """

    def __init__(self, folder: Location, only: str | None = None) -> None:
        self.folder = folder
        self._only = only
        self._tags: dict[str, Points] = {}
        self._files: dict[str, _EventFile] = {}

    @property
    def damaged(self) -> Mapping[str, str]:
        """See `Source.damaged`."""
        return {name: file.damage for name, file in self._files.items() if file.damage}

    def info(self) -> dict[str, Any]:
        """See `Source.info`."""
        self._update()
        times = [t for points in self._tags.values() for t in (points.times[0], points.times[-1])]
        known = {"starts": [min(times)], "ended": max(times)} if times else {}
        return {
            "name": self.folder.name,
            "status": "unknown",
            "format": "TensorBoard",
            "starts": [],
            **known,
        }

    def names(self) -> tuple[str, ...]:
        """See `Source.names`."""
        self._update()
        return tuple(assign_names(self._tags, tag_name).values())

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """See `Source.read`."""
        self._update()
        names = assign_names(self._tags, tag_name)
        return lay_out({n: self._tags[tag] for tag, n in names.items() if wanted(n)})

    def events(self) -> list[dict[str, Any]]:
        """See `Source.events`; there are none."""
        return []

    def _update(self) -> None:
        for name in [self._only] if self._only else event_files(self.folder):
            if name not in self._files:
                self._files[name] = _EventFile(self.folder / name)
            for tag, step, time, value in self._files[name].new_scalars():
                self._tags.setdefault(tag, Points()).add(step, time, value)


class _EventFile:
    """One event file, and how far it has been read."""

    def __init__(self, location: Location) -> None:
        self.damage = ""
        self._location = location
        self._offset = 0
        self._plugins: dict[str, str] = {}

    def new_scalars(self) -> Iterator[tuple[str, int, float, float]]:
        """Tag, step, time and value of what was written since the last call."""
        for event in self._new_events():
            for value in event.summary.value:
                number = self._scalar(value)
                if number is not None:
                    yield value.tag, event.step, event.wall_time, number

    def _new_events(self) -> Iterator[Any]:
        with self._location.open() as file:
            file.seek(self._offset)
            data = file.read()
        frames, end = find_frames(data)
        self._offset += end
        if _is_damaged(data[end:]):
            self.damage = f"nothing can be read after byte {self._offset}"
        good = sound(data, frames)
        if not good.all():
            self.damage = f"records with a wrong checksum, left out: {int((~good).sum())}"
        for (begin, stop), whole in zip(frames, good, strict=True):
            if whole:
                yield from self._parsed(data[begin:stop])

    def _parsed(self, record: bytes) -> Iterator[Any]:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            yield Event.FromString(record)
        except DecodeError:  # a long one, whose checksum was not looked at
            self.damage = "a record that is no event, left out"

    def _scalar(self, value: Any) -> float | None:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            return float(value.simple_value)
        # What a tensor is for stands in a tag's first value only.
        plugin = value.metadata.plugin_data.plugin_name
        if plugin:
            self._plugins[value.tag] = plugin
        if kind != "tensor" or self._plugins.get(value.tag) != "scalars":
            return None
        if len(value.tensor.float_val) == 1:
            return float(value.tensor.float_val[0])
        from tensorboard.util.tensor_util import make_ndarray

        array = make_ndarray(value.tensor)
        return float(array.item()) if array.size == 1 else None


def _is_damaged(rest: bytes) -> bool:
    """Whether what follows the last whole record is more than one that is not complete yet."""
    return len(rest) >= 12 and not sound(rest, [(0, 8)]).all()

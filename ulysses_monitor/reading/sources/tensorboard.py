"""Reads the scalars in a folder of TensorBoard event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ulysses_monitor.common.extras import explain_missing
from ulysses_monitor.reading.sources.base import MetricLog, build_block
from ulysses_monitor.reading.sources.records import find_frames, has_sound_checksum, is_damaged
from ulysses_monitor.records.trainer_names import assign_names, tag_name
from ulysses_monitor.store import Block, Location

__all__ = ["TensorBoardSource", "find_event_folders", "list_event_files"]

_MARK = "tfevents"
_MAX_DEPTH = 4


def list_event_files(folder: Location) -> list[str]:
    """Returns the names of the folder's event files, oldest first: a name begins with its time."""
    return [name for name in folder.children() if _MARK in name]


def find_event_folders(folder: Location) -> list[Location]:
    """Returns the folders below `folder` that hold event files."""
    found = folder.filesystem.find(folder.path, maxdepth=_MAX_DEPTH)
    files = [str(path).rpartition("/") for path in found]
    parents = dict.fromkeys(parent for parent, _, name in files if _MARK in name)
    return [Location(folder.filesystem, parent) for parent in sorted(parents)]


class TensorBoardSource:
    """Reads the scalars in event files; each call reads only what has been appended.

    The tags of a Trainer, such as ``train/loss``, get this project's names; other tags are kept.

    Args:
        folder: the folder with the event files.
        only: the name of the one file to read; all files if None.
    """

    def __init__(self, folder: Location, only: str | None = None) -> None:
        self.folder = folder
        self._only = only
        self._tags: dict[str, MetricLog] = {}
        self._files: dict[str, _EventFile] = {}

    @property
    def damaged(self) -> Mapping[str, str]:
        """See `Source.damaged`."""
        return {name: file.damage for name, file in self._files.items() if file.damage}

    def info(self) -> dict[str, Any]:
        """See `Source.info`."""
        self._update()
        times = [t for log in self._tags.values() for t in (log.times[0], log.times[-1])]
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
        return build_block({n: self._tags[tag] for tag, n in names.items() if wanted(n)})

    def events(self) -> list[dict[str, Any]]:
        """See `Source.events`; there are none."""
        return []

    def _update(self) -> None:
        for name in [self._only] if self._only else list_event_files(self.folder):
            if name not in self._files:
                self._files[name] = _EventFile(self.folder / name)
            for tag, step, time, value in self._files[name].new_scalars():
                self._tags.setdefault(tag, MetricLog()).add(step, time, value)


class _EventFile:
    """One event file, and how far it has been read."""

    def __init__(self, location: Location) -> None:
        self.damage = ""
        self._location = location
        self._offset = 0
        self._plugins: dict[str, str] = {}

    def new_scalars(self) -> Iterator[tuple[str, int, float, float]]:
        """Yields the tag, step, time and value of each scalar written since the last call."""
        for event in self._new_events():
            for value in event.summary.value:
                number = self._as_scalar(value)
                if number is not None:
                    yield value.tag, event.step, event.wall_time, number

    def _new_events(self) -> Iterator[Any]:
        with self._location.open() as file:
            file.seek(self._offset)
            data = file.read()
        frames, end = find_frames(data)
        self._offset += end
        if is_damaged(data[end:]):
            self.damage = f"unreadable after byte {self._offset}"
        sound = [frame for frame in frames if has_sound_checksum(data, frame)]
        if len(sound) < len(frames):
            self.damage = f"records with a wrong checksum, skipped: {len(frames) - len(sound)}"
        for begin, stop in sound:
            yield from self._parse(data[begin:stop])

    def _parse(self, record: bytes) -> Iterator[Any]:
        with explain_missing("TensorBoard files"):
            from google.protobuf.message import DecodeError
            from tensorboard.compat.proto.event_pb2 import Event

        try:
            yield Event.FromString(record)
        except DecodeError:
            self.damage = "a record that is not an event, skipped"

    def _as_scalar(self, value: Any) -> float | None:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            return float(value.simple_value)
        # Only the first value of a tag names the plugin that it is for.
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

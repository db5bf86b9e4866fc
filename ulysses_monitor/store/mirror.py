"""Copies a run directory to a URL during the training, so that it survives the machine."""

from __future__ import annotations

import json
import math
import os
import posixpath
import time
from contextlib import suppress
from pathlib import Path

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.masking import mask_text
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store.control_file import CONTROL_FILE
from ulysses_monitor.store.directory import OWN_FILES
from ulysses_monitor.store.location import Location

__all__ = ["MirrorSink", "check_mirror"]

_FileStamp = tuple[int, int]
_UNKNOWN = -1, -1


def check_mirror(url: str) -> None:
    """Checks a URL without connecting to it.

    Raises:
        InputError: it is not a URL that can be opened here.
    """
    if not isinstance(url, str) or not url:
        raise InputError(f"monitor: mirror is {url!r}; expected a URL, such as s3://bucket/run")
    try:
        Location.of(url)
    except InputError as error:
        raise InputError(f"monitor: mirror: {error}") from None


class MirrorSink:
    """Keeps a copy of what the run itself writes, without checkpoints and models.

    It is a sink so that the bus protects the training from it: a URL that fails or hangs only
    delays the copy. It copies files, ignores items, and must be closed after the store.

    Args:
        run_dir: the run directory.
        url: where the copy goes; created if it does not exist.
        every_seconds: shortest pause between two copies.
        replace: whether to replace another run at the URL.

    Raises:
        InputError: the URL cannot be opened, is inside the run directory, or holds something that
            the run directory does not: another run, or more of this one.
    """

    name = "mirror"

    def __init__(
        self, run_dir: Path, url: str, every_seconds: float = 15.0, *, replace: bool = False
    ) -> None:
        self._source, self._target = run_dir, Location.of(url)
        local = self._target.local
        if local is not None and run_dir.resolve() in [local.resolve(), *local.resolve().parents]:
            raise InputError(
                f"monitor: mirror is {url}, which is in the run directory; expected another place"
            )
        self._every, self._copied_at = every_seconds, -math.inf
        self._copied: dict[str, _FileStamp] | None = None
        self._replace = replace
        with suppress(OSError):  # an unreachable URL may come back
            self._check()

    def write(self, item: StepRecord | Event) -> None:
        """Does nothing, because the store writes the files."""

    def flush(self) -> None:
        """Copies what changed, at most every `every_seconds`."""
        if time.monotonic() - self._copied_at >= self._every:
            self._copy()

    def close(self) -> None:
        """Copies what changed."""
        self._copy()

    def _check(self) -> None:
        """Refuses to replace what may be the only copy of a run."""
        try:
            there = json.loads((self._target / "run.json").read())
        except (FileNotFoundError, ValueError):
            return
        here = self._source / "run.json"
        ours = json.loads(here.read_text(encoding="utf-8")) if here.exists() else {}
        before, now = there.get("starts", []), ours.get("starts", [])
        if not self._replace and now[: len(before)] != before:
            raise InputError(
                f"monitor: mirror is {mask_text(str(self._target))}, which holds a run that "
                f"{self._source} does not continue; copy it back first, or choose another mirror"
            )

    def _copy(self) -> None:
        """Copies new files before removing old ones, so that no step is ever missing."""
        there = self._list_files()
        if self._copied is None:  # also removes what an earlier process left there
            self._check()
            folders = ("metrics", "tensorboard") if self._replace else ("metrics",)
            left = [f"{f}/{name}" for f in folders for name in (self._target / f).children()]
            self._copied = dict.fromkeys(left, _UNKNOWN)
        for name, stamp in there.items():
            if self._copied.get(name) != stamp and self._copy_file(name):
                self._copied[name] = stamp
        for name in self._copied.keys() - there.keys():
            filesystem = self._target.filesystem
            path = posixpath.join(self._target.path, name)
            if filesystem.exists(path):
                filesystem.rm_file(path)
            del self._copied[name]
        self._copied_at = time.monotonic()

    def _copy_file(self, name: str) -> bool:
        filesystem, path = self._target.filesystem, posixpath.join(self._target.path, name)
        filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
        # A reader may have the old file open. Object stores replace files atomically; on a local
        # file system, renaming does.
        local = self._target.local is not None
        place = posixpath.join(posixpath.dirname(path), ".copying") if local else path
        try:
            filesystem.put_file(str(self._source / name), place)
        except FileNotFoundError:
            return False  # it was sealed or compacted; the next copy has it under its new name
        if local:
            os.replace(place, path)  # noqa: PTH105 - both are strings from fsspec
        return True

    def _list_files(self) -> dict[str, _FileStamp]:
        """Returns size and modification time of the run's files, run.json last."""
        found: dict[str, _FileStamp] = {}
        copied = [name for name in OWN_FILES if name != CONTROL_FILE]
        for own in sorted(copied, key=lambda name: name == "run.json"):
            path = self._source / own
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file() and not file.name.startswith("."):
                    stat = file.stat()
                    relative = file.relative_to(self._source).as_posix()
                    found[relative] = stat.st_size, stat.st_mtime_ns
        return found

"""Reads the ``metrics/`` of a run that is finished, live, killed or damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import pyarrow as pa

from ulysses_monitor.store import compacted
from ulysses_monitor.store.block import Block, DamagedError, merge
from ulysses_monitor.store.location import Location
from ulysses_monitor.store.names import COMPACTED, MetricsFile
from ulysses_monitor.store.part import PartLayout, read_names, read_part
from ulysses_monitor.store.tail import read_tail, read_tail_names

__all__ = ["MetricsReader", "list_files"]

_THREADS = 4
_TRIES = 100

_T = TypeVar("_T")
Places = Callable[[tuple[str, ...]], Sequence[int]]
"""Returns the positions of the wanted metrics among all."""


def list_files(location: Location) -> list[MetricsFile]:
    """Returns the files of ``metrics/`` at one instant, oldest first."""
    names = location.children()
    while names != (again := location.children()):  # a tail was sealed while the names were read
        names = again
    files = [file for file in map(MetricsFile.parse, names) if file is not None]
    # If a writer was killed before it removed the tail of a part, the part counts.
    sealed = {file.number for file in files if file.schema is not None}
    return sorted(
        (f for f in files if not (f.is_tail and f.number in sealed)), key=lambda f: f.number
    )


class MetricsReader:
    """Reads ``metrics/`` at each call, so it follows a live run.

    It skips damaged files, names them in `damaged`, and serves the rest. Of a file that a killed
    writer left incomplete, it serves all complete steps.

    Args:
        location: the folder ``metrics``.

    Attributes:
        damaged: why files are damaged, by file name, as far as calls have read them.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._names: dict[str, tuple[str, ...]] = {}
        self._layouts: dict[tuple[str | None, int], PartLayout] = {}
        self.damaged: dict[str, str] = {}

    def names(self) -> tuple[str, ...]:
        """Returns all metric names, in the order of the run's schemas."""
        return self._retry_until_stable(lambda files: tuple(dict.fromkeys(self._all_names(files))))

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """Returns the metrics whose names `wanted` accepts, one row per step.

        A step that was trained twice has the values of the later training.
        """
        return self._retry_until_stable(lambda files: merge(self._blocks(files, wanted)))

    def verify(self) -> dict[str, str]:
        """Reads everything, in little memory, and returns why files are damaged, by name."""

        def read(files: list[MetricsFile]) -> dict[str, str]:
            for file in files:
                self._read_or_note_damage(file, self._read_through, None)
            return dict(self.damaged)

        return self._retry_until_stable(read)

    def _read_through(self, file: MetricsFile) -> None:
        if file.name == COMPACTED:
            with self._open(file) as content:
                compacted.verify(content)
        else:
            self.read_file(file, lambda _: True)

    def _retry_until_stable(self, read: Callable[[list[MetricsFile]], _T]) -> _T:
        """Repeats a read if files disappeared between listing and reading them."""
        for _ in range(_TRIES):
            files = list_files(self._location)
            there = {file.name for file in files}
            self.damaged = {name: why for name, why in self.damaged.items() if name in there}
            try:
                return read(files)
            except FileNotFoundError as error:
                gone = error
        raise gone

    def _all_names(self, files: list[MetricsFile]) -> Iterator[str]:
        for file in files:
            yield from self._read_or_note_damage(file, self.read_names, ())

    def _blocks(self, files: list[MetricsFile], wanted: Callable[[str], bool]) -> list[Block]:
        """Returns what each file has of the wanted metrics, oldest first."""
        for file in files:  # reads the names of each schema once, before several threads need them
            if file.schema is not None and file.schema not in self._names:
                self._read_or_note_damage(file, self.read_names, ())

        # Many parts have the same names, so the positions are found once.
        places = cache(lambda names: [i for i, n in enumerate(names) if wanted(n)])

        def read(file: MetricsFile) -> Block | None:
            block: Block | None = self._read_or_note_damage(file, self._read_file, None, places)
            if block is None and file.schema is not None:
                block = self._tail_of(file, places)
            return None if block is None else block.drop_empty_rows()

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                found = list(pool.map(read, files))
        except RuntimeError:  # threads cannot start while the interpreter shuts down
            found = [read(file) for file in files]
        return [block for block in found if block is not None]

    def _tail_of(self, part: MetricsFile, places: Places) -> Block | None:
        """Returns the tail that a damaged part was made from, if it still exists."""
        tail = MetricsFile.tail(part.number)
        try:
            block: Block | None = self._read_or_note_damage(tail, self._read_file, None, places)
        except FileNotFoundError:
            return None
        return block

    def _read_or_note_damage(
        self, file: MetricsFile, read: Callable[..., Any], otherwise: Any, *args: Any
    ) -> Any:
        try:
            return read(file, *args)
        except FileNotFoundError:
            raise
        except DamagedError as error:
            self.damaged[file.name] = str(error)
            return error.block
        except (ValueError, OSError, pa.ArrowException) as error:
            self.damaged[file.name] = " ".join(str(error).split())
            return otherwise

    # -- one file ----------------------------------------------------------------------------

    def read_file(self, file: MetricsFile, wanted: Callable[[str], bool]) -> Block:
        """Returns every step of one file, with the metrics whose names `wanted` accepts.

        Raises:
            ValueError: the file is damaged.
            FileNotFoundError: the file no longer exists.
        """
        return self._read_file(file, lambda names: [i for i, n in enumerate(names) if wanted(n)])

    def _read_file(self, file: MetricsFile, places: Places) -> Block:
        if file.is_tail:
            block = self._read_tail(file)
            return block.select(places(block.names))
        if file.schema is None:
            with self._open(file) as content:
                return compacted.read(content, places)
        names = self.read_names(file)
        chosen = places(names)
        with self._open(file) as content:
            if isinstance(content, pa.MemoryMappedFile):
                with suppress(ValueError):  # the full read below then finds out what is wrong
                    return self._layout(file, content).read(content, names, chosen)
            return read_part(content, names, chosen)

    def _layout(self, file: MetricsFile, content: Any) -> PartLayout:
        key = file.schema, content.size()
        if key not in self._layouts:
            self._layouts[key] = PartLayout.of(content)
        return self._layouts[key]

    def _read_tail(self, file: MetricsFile) -> Block:
        block, damaged = read_tail((self._location / file.name).read())
        if damaged:
            self.damaged[file.name] = "some of its steps are damaged"
        return block

    def read_names(self, file: MetricsFile) -> tuple[str, ...]:
        """Returns the metric names of one file.

        Raises:
            ValueError: the file is damaged.
            FileNotFoundError: the file no longer exists.
        """
        if file.is_tail:
            return read_tail_names((self._location / file.name).read())
        if file.schema in self._names:
            return self._names[file.schema]
        with self._open(file) as content:
            if file.schema is None:
                return compacted.read_names(content)
            names = self._names[file.schema] = read_names(content, file)
            return names

    def _open(self, file: MetricsFile) -> Any:
        location = self._location / file.name
        local = location.local
        return pa.PythonFile(location.open(), "r") if local is None else pa.memory_map(str(local))

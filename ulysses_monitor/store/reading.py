"""Reads a run's ``metrics/``, finished or being written, whatever its parts went through."""

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
from ulysses_monitor.store.tail import read_tail, tail_names

__all__ = ["MetricsReader", "list_files"]

_THREADS = 4
_TRIES = 100

_T = TypeVar("_T")
Places = Callable[[tuple[str, ...]], Sequence[int]]
"""Which of some metrics are wanted, by their places."""


def list_files(location: Location) -> list[MetricsFile]:
    """What lies in ``metrics/`` at one instant, oldest first."""
    names = location.children()
    while names != (again := location.children()):  # a part was sealed while the names were read
        names = again
    files = [file for file in map(MetricsFile.parse, names) if file is not None]
    # Where a writer was killed before it could remove the tail of a part, the part counts.
    sealed = {file.number for file in files if file.schema is not None}
    return sorted(
        (f for f in files if not (f.is_tail and f.number in sealed)), key=lambda f: f.number
    )


class MetricsReader:
    """Reads ``metrics/`` at each call, so it follows a live run.

    A part that is damaged is named in `damaged` and skipped, and the rest is served; so is every
    whole step before the end that a killed writer tore.

    Args:
        location: the folder ``metrics``.

    Attributes:
        damaged: why each file that a call so far could not read, or not whole, is damaged.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._names: dict[str, tuple[str, ...]] = {}
        self._layouts: dict[tuple[str | None, int], PartLayout] = {}
        self.damaged: dict[str, str] = {}

    def names(self) -> tuple[str, ...]:
        """All metric names, in the order of the run's schemas."""
        return self._at_rest(lambda files: tuple(dict.fromkeys(self._all_names(files))))

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """The metrics whose name is `wanted`, a row a step, the later training of a step."""
        return self._at_rest(lambda files: merge(self._blocks(files, wanted)))

    def verify(self) -> dict[str, str]:
        """Reads everything, a file and some columns at a time; why files are damaged."""

        def read(files: list[MetricsFile]) -> dict[str, str]:
            for file in files:
                self._guarded(file, self._read_through, None)
            return dict(self.damaged)

        return self._at_rest(read)

    def _read_through(self, file: MetricsFile) -> None:
        if file.name == COMPACTED:
            with self._open(file) as content:
                compacted.verify(content)
        else:
            self.read_file(file, lambda _: True)

    def _at_rest(self, read: Callable[[list[MetricsFile]], _T]) -> _T:
        """Reads again where files went away between listing and reading them."""
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
            yield from self._guarded(file, self.read_names, ())

    def _blocks(self, files: list[MetricsFile], wanted: Callable[[str], bool]) -> list[Block]:
        """What each file has of the metrics whose name is `wanted`, oldest first."""
        for file in files:  # the names of each schema once, before several threads ask for them
            if file.schema is not None and file.schema not in self._names:
                self._guarded(file, self.read_names, ())

        # The same metrics of many parts: they are looked for once.
        places = cache(lambda names: [i for i, n in enumerate(names) if wanted(n)])

        def read(file: MetricsFile) -> Block | None:
            block: Block | None = self._guarded(file, self._read_file, None, places)
            if block is None and file.schema is not None:
                block = self._tail_of(file, places)
            return None if block is None else block.drop_empty_rows()

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                found = list(pool.map(read, files))
        except RuntimeError:  # no new thread while the interpreter ends
            found = [read(file) for file in files]
        return [block for block in found if block is not None]

    def _tail_of(self, part: MetricsFile, places: Places) -> Block | None:
        """What a damaged part was made of, where that is still there."""
        tail = MetricsFile.tail(part.number)
        try:
            block: Block | None = self._guarded(tail, self._read_file, None, places)
        except FileNotFoundError:
            return None
        return block

    def _guarded(
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
        """Every step of one file, with the metrics whose name is `wanted`.

        Raises:
            ValueError: the file is damaged.
            FileNotFoundError: it is not there any more.
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
                with suppress(ValueError):  # then it is read in full, and says what is wrong
                    return self._layout(file, content).read(content, names, chosen)
            return read_part(content, names, chosen)

    def _layout(self, file: MetricsFile, content: Any) -> PartLayout:
        alike = file.schema, content.size()
        if alike not in self._layouts:
            self._layouts[alike] = PartLayout.of(content)
        return self._layouts[alike]

    def _read_tail(self, file: MetricsFile) -> Block:
        block, damaged = read_tail((self._location / file.name).read())
        if damaged:
            self.damaged[file.name] = "some of its steps are damaged"
        return block

    def read_names(self, file: MetricsFile) -> tuple[str, ...]:
        """Metric names of one file.

        Raises:
            ValueError: the file is damaged.
            FileNotFoundError: it is not there any more.
        """
        if file.is_tail:
            return tail_names((self._location / file.name).read())
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

"""The records that rules look back on, and columns of the metrics that they name."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema, StepRecord

__all__ = ["HISTORY", "Array", "Baseline", "History", "median_of"]

HISTORY = 256
"""Records that a rule can look back on."""

_SCHEMAS = 256
"""Schemas whose places are kept: a training may change what it trains any number of times."""

_BLOCK = 8
"""Steps for which a baseline stays as it is: computing it takes longer than all else."""

Array = npt.NDArray[np.float64]


class Baseline(NamedTuple):
    """What is usual for a metric, from the values before the current block of steps.

    Attributes:
        size: how many finite values there were.
        median: their median.
        spread: scatter of their logarithms, from one value to the next, so that a trend does not
            count: 1.4826 / sqrt(2) x median of absolute differences; NaN if one is not positive.
        largest: the largest of them.
    """

    size: int
    median: float
    spread: float
    largest: float


@dataclass
class _Table:
    """Rows of all metrics that match a pattern."""

    names: tuple[str, ...]
    rows: deque[Array]


class _Places(NamedTuple):
    """Where a schema has the metrics that are kept."""

    columns: npt.NDArray[np.intp]
    values: npt.NDArray[np.intp]
    groups: dict[str, tuple[tuple[str, ...], npt.NDArray[np.intp]]]


class History(Sequence[StepRecord]):
    """The newest `HISTORY` records, oldest first, and what rules need of them, cheap to read.

    Args:
        names: metrics of which columns are kept.
        tables: patterns of metrics of which all values are kept.
    """

    def __init__(self, names: Iterable[str] = (), tables: Iterable[str] = ()) -> None:
        self._records: deque[StepRecord] = deque(maxlen=HISTORY)
        self._place = {name: i for i, name in enumerate(dict.fromkeys(names))}
        # Each value is written twice, so that any window is one slice without a copy.
        self._rows = np.full((2 * HISTORY, len(self._place)), np.nan)
        self._tables = {pattern: _Table((), deque(maxlen=HISTORY)) for pattern in tables}
        self._newest: list[float] = [math.nan] * len(self._place)
        self._known: dict[Schema, _Places] = {}
        self._baselines: dict[tuple[str, int, int], Baseline] = {}
        self._starts: dict[tuple[str, int], float] = {}
        self._usual: dict[tuple[str, int], Array] = {}
        self._next = self._block = 0
        self._merged: dict[tuple[Schema, Schema], Schema] = {}

    @classmethod
    def of(
        cls, records: Iterable[StepRecord], names: Iterable[str], tables: Iterable[str] = ()
    ) -> History:
        """Returns the history of records that are there already."""
        history = cls(names, tables)
        for record in records:
            history.append(record)
        return history

    # -- the records -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...

    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        return list(self._records)[index] if isinstance(index, slice) else self._records[index]

    def append(self, record: StepRecord) -> None:
        """Adds a record; one of the newest step is merged into it: rules see whole steps."""
        is_new = not self._records or self._records[-1].step != record.step
        if is_new:
            self._start_row(record.step)
            self._records.append(record)
        else:
            self._records.append(self._merge(self._records.pop(), record))
        self._fill_row(record, is_new)

    def _start_row(self, step: int) -> None:
        self._next = 0 if self._next == HISTORY - 1 else self._next + 1
        if step // _BLOCK != self._block:
            self._block = step // _BLOCK
            self._baselines.clear()
            self._starts.clear()
            self._usual.clear()
        self._newest = [math.nan] * len(self._place)

    def _fill_row(self, record: StepRecord, is_new: bool) -> None:
        places = self._places_of(record.schema)
        found = record.values[places.values]
        row = self._rows[self._next]
        if is_new:
            row.fill(np.nan)
        row[places.columns] = found
        self._rows[self._next + HISTORY] = row
        self._newest = row.tolist()
        for pattern, table in self._tables.items():
            names, where = places.groups[pattern]
            if names:
                self._add_to_table(table, names, record.values[where])

    def _add_to_table(self, table: _Table, names: tuple[str, ...], values: Array) -> None:
        if table.names is not names and table.names != names:  # what is trained has changed
            table.rows.clear()
            self._usual.clear()
        table.names = names
        table.rows.append(values)

    def _places_of(self, schema: Schema) -> _Places:
        if schema not in self._known:
            if len(self._known) >= _SCHEMAS:
                self._known.clear()
            pairs = [(c, schema.index[n]) for n, c in self._place.items() if n in schema.index]
            columns, values = zip(*pairs, strict=True) if pairs else ((), ())
            groups = {pattern: _group(schema, pattern) for pattern in self._tables}
            places = _Places(np.array(columns, np.intp), np.array(values, np.intp), groups)
            self._known[schema] = places
        return self._known[schema]

    def _merge(self, first: StepRecord, second: StepRecord) -> StepRecord:
        schemas = first.schema, second.schema
        if schemas not in self._merged:
            if len(self._merged) >= _SCHEMAS:
                self._merged.clear()
            self._merged[schemas] = _join(*schemas)
        schema = self._merged[schemas]
        values = np.concatenate([first.values, second.values])
        if len(schema.names) < len(values):  # a number that was logged twice: the later one counts
            merged = first.to_dict() | second.to_dict()
            values = np.array([merged[name] for name in schema.names], np.float64)
        return StepRecord(first.step, first.time, schema, values)

    # -- columns ---------------------------------------------------------------------------------

    def last(self, name: str) -> float:
        """Returns the newest record's value of a kept metric; NaN if it does not have it."""
        return self._newest[self._place[name]]

    def column(self, name: str) -> Array:
        """Returns the values of a kept metric, a view; NaN where a record lacks it [len(self)]."""
        end = self._next + HISTORY + 1
        return self._rows[end - len(self._records) : end, self._place[name]]

    def samples(self, name: str) -> Array:
        """Returns the finite values of a kept metric, oldest first."""
        values = self.column(name)
        return values[np.isfinite(values)]

    def highest(self, name: str) -> float:
        """Returns the largest finite value of a kept metric; NaN if there is none."""
        values = self.samples(name)
        return float(values.max()) if len(values) else math.nan

    # -- what is usual: it stays as it is for eight steps ------------------------------------------

    def baseline(self, name: str, window: int, skip: int = 0) -> Baseline:
        """Returns what was usual in values before this block of eight steps.

        Args:
            name: a kept metric.
            window: number of values.
            skip: number of values between them and this block.
        """
        key = name, window, skip
        found = self._baselines.get(key)
        if found is None:
            values = self.column(name)[: len(self) - self._in_block()]
            values = values[np.isfinite(values)]
            values = values[: max(0, len(values) - skip)][-window:]
            found = self._baselines[key] = _baseline(values)
        return found

    def start(self, name: str, size: int) -> float:
        """Returns the median of the oldest `size` values; NaN until there are as many."""
        key = name, size
        found = self._starts.get(key)
        if found is None:
            values = self.samples(name)[:size]
            found = median_of(values) if len(values) == size else math.nan
            self._starts[key] = found
        return found

    def usual_row(self, pattern: str, window: int) -> Array:
        """Returns the median of each column of a kept pattern over `window` rows; may be empty."""
        key = pattern, window
        found = self._usual.get(key)
        if found is None:
            rows = list(self._tables[pattern].rows)[:-_BLOCK][-window:]
            found = _middle_row(rows) if len(rows) == window else np.zeros(0)
            self._usual[key] = found
        return found

    def _in_block(self) -> int:
        nearest = range(-1, -min(_BLOCK, len(self)) - 1, -1)
        return sum(self._records[i].step // _BLOCK == self._block for i in nearest)

    # -- tables --------------------------------------------------------------------------------

    def table(self, pattern: str) -> tuple[tuple[str, ...], Sequence[Array]]:
        """Returns the names that match a kept pattern, and rows of their values, oldest first.

        Only records that have such metrics give a row.
        """
        table = self._tables[pattern]
        return table.names, table.rows


def _group(schema: Schema, pattern: str) -> tuple[tuple[str, ...], npt.NDArray[np.intp]]:
    names = tuple(schema.match(pattern))
    return names, np.array([schema.index[name] for name in names], np.intp)


def _join(first: Schema, second: Schema) -> Schema:
    if second.index.keys() <= first.index.keys():
        return first
    return Schema(tuple(dict.fromkeys(first.names + second.names)))


def _middle_row(rows: list[Array]) -> Array:
    middle: Array = np.sort(np.array(rows), axis=0)[len(rows) // 2]
    return middle


def median_of(values: Array) -> float:
    """Returns the median of values without NaN, at a tenth of the price of `numpy.median`.

    NaN if there are none.
    """
    size = len(values)
    if not size:
        return math.nan
    ordered = np.sort(values)
    middle = size // 2
    return float(ordered[middle] if size % 2 else (ordered[middle - 1] + ordered[middle]) / 2)


def _baseline(values: Array) -> Baseline:
    if not len(values):
        return Baseline(0, math.nan, math.nan, math.nan)
    ordered = np.sort(values)
    median, largest = median_of(ordered), float(ordered[-1])
    if ordered[0] <= 0 or len(values) < 2:
        return Baseline(len(values), median, math.nan, largest)
    leaps = np.abs(np.diff(np.log(values)))
    return Baseline(len(values), median, 1.4826 / math.sqrt(2) * median_of(leaps), largest)

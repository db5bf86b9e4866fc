"""Finds rows that are equal or nearly so, among any number, with 53 bytes for each.

Candidates share one of eight bands of four signature values (locality-sensitive hashing, Indyk and
Motwani 1998), and count if 26 of their 32 values agree. So pairs of rows whose token triples have a
Jaccard similarity of 0.95 are found with a probability of 0.999, 0.9 with 0.96, 0.8 with 0.5, 0.7
with 0.1 and 0.5 with less than 0.001 (binomial tails).

Legend: N rows, K values of a signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ulysses_core.data.files import Row
from ulysses_core.data.health.signatures import SIZE, hash_rows, sign_rows

__all__ = ["Duplicates", "RowIndex"]

_BAND = 4
_AGREE = 26
"""Equal values, of `SIZE`, of two rows that are nearly the same: 0.81."""
_CHUNK = 1 << 18

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Duplicates:
    """Pairs of rows: each row that repeats an earlier one, with that one.

    Attributes:
        later: the rows that repeat another, ascending.
        earlier: the rows that they repeat.
    """

    later: Places
    earlier: Places

    def __len__(self) -> int:
        return len(self.later)

    def across(self, splits: npt.NDArray[np.uint8]) -> Duplicates:
        """Returns the pairs whose rows are of different splits."""
        differ = splits[self.later] != splits[self.earlier]
        return Duplicates(self.later[differ], self.earlier[differ])

    def within(self, splits: npt.NDArray[np.uint8]) -> Duplicates:
        """Returns the pairs whose rows are of one split."""
        same = splits[self.later] == splits[self.earlier]
        return Duplicates(self.later[same], self.earlier[same])


@dataclass
class RowIndex:
    """Fingerprints of rows, and where each row is."""

    files: list[Path] = field(default_factory=list)
    _parts: list[tuple[npt.NDArray[Any], ...]] = field(default_factory=list)
    _prefix: list[int] | None = None

    def add(self, places: Sequence[Row], rows: Sequence[Sequence[int]], split: int) -> None:
        """Adds a batch of rows.

        Args:
            places: where they are.
            rows: their tokens.
            split: the number of their split.
        """
        if self._prefix is None:
            self._prefix = _shared_prefix(rows)
        signatures, enough = sign_rows([self._strip(row) for row in rows])
        files = np.array([self._number(place.file) for place in places], np.uint32)
        numbers = np.array([place.number for place in places], np.uint32)
        lengths = np.fromiter(map(len, rows), np.uint32, len(rows))
        kind = np.full(len(rows), split, np.uint8) | (enough.astype(np.uint8) << 7)
        self._parts.append((hash_rows(rows), signatures, files, numbers, lengths, kind))

    def finish(self) -> None:
        """Joins what was added; to be called before anything is asked."""
        columns: list[npt.NDArray[Any]] = []
        if not self._parts:
            self.add([], [], 0)
        for i in range(6):
            columns.append(np.concatenate([part[i] for part in self._parts]))
            for j, part in enumerate(self._parts):  # so that memory is needed for one column twice
                self._parts[j] = (*part[:i], part[i][:0], *part[i + 1 :])
        self._parts = []
        self._hashes, self._signatures, self._files, self._numbers = columns[:4]
        self.lengths, kind = columns[4], columns[5]
        self._enough = kind >> 7 != 0
        self.splits: npt.NDArray[np.uint8] = (kind & 0x7F).astype(np.uint8)

    def where(self, row: int) -> str:
        """Returns where a row is."""
        return Row({}, self.files[self._files[row]], int(self._numbers[row])).where

    def find_exact(self) -> Duplicates:
        """Returns the rows with the same tokens as an earlier one, which is the first of them."""
        order = np.lexsort((np.arange(len(self._hashes)), self._hashes))
        begins = np.ones(len(order), bool)
        begins[1:] = self._hashes[order[1:]] != self._hashes[order[:-1]]
        first = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
        return _sort(order[~begins], first[~begins])

    def find_near(self, exact: Duplicates) -> Duplicates:
        """Returns the rows that are nearly equal to an earlier one, without those of `exact`."""
        known = self._enough.copy()
        known[exact.later] = False
        rows = np.flatnonzero(known)
        partner = np.full(len(known), -1, np.int64)
        for earlier, later in self._candidates(rows):
            for start in range(0, len(later), _CHUNK):
                a, b = earlier[start : start + _CHUNK], later[start : start + _CHUNK]
                agree = (self._signatures[a] == self._signatures[b]).sum(axis=1) >= _AGREE
                new = agree & (partner[b] < 0)
                partner[b[new]] = a[new]
        later = np.flatnonzero(partner >= 0)
        return Duplicates(later, partner[later])

    def _candidates(self, rows: Places) -> Iterator[tuple[Places, Places]]:
        """Yields pairs that share a band: a row with the first, and the last, of its bucket."""
        for band in range(0, SIZE, _BAND):
            part = np.ascontiguousarray(self._signatures[rows, band : band + _BAND])
            keys = part.view(np.uint32).ravel()
            order = np.argsort(keys, kind="stable")
            ordered, keys = rows[order], keys[order]
            begins = np.ones(len(keys), bool)
            begins[1:] = keys[1:] != keys[:-1]
            first = ordered[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
            yield first[~begins], ordered[~begins]
            yield ordered[np.flatnonzero(~begins) - 1], ordered[~begins]

    def _number(self, file: Path) -> int:
        if not self.files or self.files[-1] != file:
            if file in self.files:
                return self.files.index(file)
            self.files.append(file)
        return len(self.files) - 1

    def _strip(self, row: Sequence[int]) -> Sequence[int]:
        """Leaves out what all rows begin with, such as a system prompt, which makes them alike."""
        prefix = self._prefix or []
        size = len(prefix)
        return row[size:] if size and len(row) > size and [*row[:size]] == prefix else row


def _shared_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """Returns the tokens that all rows begin with; none if all rows are equal."""
    if not rows:
        return []
    low, high = min(map(list, rows)), max(map(list, rows))
    if low == high:
        return []
    shared = 0
    while shared < min(len(low), len(high)) and low[shared] == high[shared]:
        shared += 1
    return low[:shared]


def _sort(later: Places, earlier: Places) -> Duplicates:
    order = np.argsort(later)
    return Duplicates(later[order], earlier[order])

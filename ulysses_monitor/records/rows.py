"""Fingerprints of the rows that a step trained on: numbers that name a row, not its text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["COLUMNS", "HASH_BITS", "Row", "name_rows", "sort_rows"]

COLUMNS = ("micro_batch", "index", "hash", "length", "trained", "loss")
"""What a rank keeps of a row, in this order; NaN where it is not known."""

HASH_BITS = 52
"""Bits of a row's hash: it travels as a float64, which holds such an integer exactly."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a step.

    Attributes:
        rank: the rank that trained on it; of a sequence group, its first.
        micro_batch: which of the step's micro-batches of that rank it was in, from 0.
        index: its place in the dataset, None if the sampler does not say.
        hash: of its tokens without padding, or of its values; 13 hexadecimal digits.
        length: its tokens without padding.
        trained: how many of them carry a label, None if unknown.
        loss: its mean loss per labelled token, None if unknown.
    """

    rank: int
    micro_batch: int
    index: int | None
    hash: str
    length: int
    trained: int | None
    loss: float | None

    @classmethod
    def of(cls, rank: int, numbers: Sequence[float | None]) -> Row:
        """Returns the row of what a rank keeps of it, in the order of `COLUMNS`.

        A loss that is not finite is NaN; what is None is unknown.

        Raises:
            ValueError: a number is missing or is not one.
            TypeError: likewise.
        """
        micro_batch, index, digest, length, trained, loss = numbers
        if micro_batch is None or digest is None or length is None:
            raise ValueError("a row needs a micro-batch, a hash and a length")
        return cls(
            rank=rank,
            micro_batch=int(micro_batch),
            index=None if index is None else int(index),
            hash=f"{int(digest):0{HASH_BITS // 4}x}",
            length=int(length),
            trained=None if trained is None else int(trained),
            loss=None if loss is None else float(loss),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the row for an event."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Returns the row that `to_dict` returned, also after JSON.

        Raises:
            ValueError: `data` is not one.
            TypeError: likewise.
            KeyError: likewise.
        """
        digest, loss = int(str(data["hash"]), 16), data["loss"]
        rest = (data["length"], data["trained"], None if loss is None else float(loss))
        numbers = (data["micro_batch"], data["index"], digest, *rest)
        return cls.of(int(data["rank"]), numbers)

    def describe(self) -> str:
        """Returns the row in a few words."""
        which = f"hash {self.hash}" if self.index is None else f"row {self.index}"
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        return f"rank {self.rank} {which} (length {self.length}{loss})"


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """Returns rows with the most suspicious first.

    A loss that is not finite comes first, then the highest; where no loss is known, rows that
    occur several times, then the longest.
    """
    rows = list(rows)
    counts = Counter(row.hash for row in rows)

    def key(row: Row) -> tuple[float, int, int, int, int]:
        loss = -math.inf if row.loss is None else row.loss if math.isfinite(row.loss) else math.inf
        return -loss, -counts[row.hash], -row.length, row.rank, row.micro_batch

    return sorted(rows, key=key)


def name_rows(rows: Sequence[Row], most: int = 3) -> str:
    """Names the first of some rows, and how many more there are."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return "; ".join(row.describe() for row in rows[:most]) + more

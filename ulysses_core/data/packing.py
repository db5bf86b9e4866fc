"""Packs short rows into long ones, with attention kept within each document."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["TokenRow", "best_fit_decreasing", "pack_rows"]


@dataclass(slots=True)
class TokenRow:
    """One row of token ids, with a label for each token."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] | None = None
    """Restarts at 0 at each document of a packed row; None in a row of one document."""
    answer_tokens: int = 0
    """Tokens of answers, with a label or without, in a row of one conversation."""

    def as_columns(self) -> dict[str, list[int]]:
        """Returns the row as columns of a dataset."""
        columns = {"input_ids": self.input_ids, "labels": self.labels}
        return (
            columns if self.position_ids is None else columns | {"position_ids": self.position_ids}
        )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes items over bins, trying to use few.

    Places items from longest to shortest, each in the fullest bin that has room for it. Uses at
    most 11/9 of the fewest possible bins, plus one (Johnson, 1974).

    Args:
        lengths: Size of each item, at most `capacity`.
        capacity: Size of a bin.

    Returns:
        Indices of the items in each bin, in ascending order; bins are ordered by their first item.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, (lengths[item], -1))
        if place == len(rooms):
            bins.append([])
            room, chosen = capacity, len(bins) - 1
        else:
            room, chosen = rooms.pop(place)
        bins[chosen].append(item)
        insort(rooms, (room - lengths[item], chosen))
    return sorted(sorted(items) for items in bins)


def pack_rows(rows: Sequence[TokenRow], capacity: int) -> list[TokenRow]:
    """Packs rows of at most `capacity` tokens into blocks of at most `capacity` tokens.

    Args:
        rows: Rows of one document each.
        capacity: Maximum length of a block, in tokens.

    Returns:
        Blocks with `position_ids` that restart at 0 for each document. A document's first token has
        no label, so the last token of the previous document predicts nothing.
    """
    bins = best_fit_decreasing([len(row.input_ids) for row in rows], capacity)
    return [_join([rows[index] for index in items]) for items in bins]


def _join(rows: Sequence[TokenRow]) -> TokenRow:
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for row in rows:
        input_ids += row.input_ids
        labels += [IGNORE_INDEX, *row.labels[1:]]
        position_ids += range(len(row.input_ids))
    return TokenRow(input_ids, labels, position_ids)

"""What the rows of a step say about the data: rows that were just trained on, rows that are cut.

Nothing is copied to the host: the counts travel in the step's vector.

Legend: R rows of a micro-batch, S tokens of a row, n rows of a step on this rank, N buckets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_monitor.probes.fingerprints import hash_rows
from ulysses_monitor.probes.token_set import TokenSet
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["RowShares"]

STEPS = 8
"""Earlier steps whose rows a row is compared with."""

_TIMES = 4
"""The data is known to have so many times the rows of these steps, or nothing is said."""

_MOST_ROWS = 1024
"""Rows of a step that are compared."""

_BUCKETS = 1 << 16
"""Buckets of hashes that tell how many different rows there were: never too many."""

_LEAST_ROWS, _SHORTER = 32, 0.02
"""Lengths vary if of so many rows at least this share is shorter than the longest."""
_NO_LENGTH = 1 << 40
"""Longer than any row."""

_NAMES = ("compared", "repeated", "measured", "cut")
_COMPARED, _REPEATED, _MEASURED, _CUT = _SUMS = tuple(f"rows {name}" for name in _NAMES)


@dataclass(frozen=True)
class _Rows:
    """Rows of a micro-batch.

    Attributes:
        hashes: of their tokens [R].
        lengths: in tokens without padding [R].
        is_one: whether it is one text whose length is known, and not packed from several [R].
        is_open: whether its last label is not an end token, as far as end tokens are known [R].
    """

    hashes: Tensor
    lengths: Tensor
    is_one: Tensor
    is_open: Tensor


class RowShares:
    """Counts rows over a step's micro-batches; sums over ranks become ``data/*`` metrics.

    Args:
        ends: ids of the tokens that end a text.

    Attributes:
        SUMS: names of what `take_sums` returns.
    """

    SUMS = _SUMS

    def __init__(self, ends: Sequence[int] = ()) -> None:
        self._ends = TokenSet(ends)
        self._step: list[_Rows] = []
        self._past: deque[Tensor] = deque(maxlen=STEPS)
        self._seen: Tensor | None = None
        self._lengths: Tensor | None = None

    def add(self, batch: Mapping[str, Any], labels: Tensor) -> None:
        """Counts a micro-batch.

        Args:
            batch: with ``input_ids`` [R, S].
            labels: of its rows, without the place that has none [R, S - 1].
        """
        if not len(labels):
            return
        ids = batch["input_ids"].to(labels.device)
        mask = batch.get("attention_mask")
        attended = torch.ones_like(ids, dtype=torch.bool)
        is_one = torch.zeros_like(attended[:, 0])
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            attended, is_one = mask.to(labels.device).ne(0), ~is_one
        self._step.append(
            _Rows(
                hashes=hash_rows(ids, attended),
                lengths=attended.sum(1),
                is_one=is_one & ~_are_packed(batch, attended),
                is_open=self._are_open(labels),
            )
        )

    def _are_open(self, labels: Tensor) -> Tensor:
        """Returns whether each row's last label is not an end token [R]."""
        places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        last = (places * (labels != IGNORE_INDEX)).argmax(1, keepdim=True)
        return ~self._ends.has(labels.gather(1, last)[:, 0])

    def take_sums(self) -> dict[str, Tensor | float]:
        """Returns this rank's sums over the step, the same names on all ranks, and starts anew."""
        rows, self._step = self._step, []
        sums: dict[str, Tensor | float] = dict.fromkeys(_SUMS, 0.0)
        if rows:
            sums |= self._compare(torch.cat([each.hashes for each in rows])[:_MOST_ROWS])
            sums |= self._measure(
                torch.cat([each.lengths for each in rows]),
                torch.cat([each.is_one for each in rows]),
                torch.cat([each.is_open for each in rows]),
            )
        return sums

    def _compare(self, hashes: Tensor) -> dict[str, Tensor | float]:
        """Counts rows that occurred before in the step [n], or in the steps before."""
        past = [each.to(hashes.device) for each in self._past]
        self._past.append(hashes)
        if self._seen is None:
            self._seen = torch.zeros(_BUCKETS, dtype=torch.bool, device=hashes.device)
        self._seen = self._seen.to(hashes.device).index_fill_(0, hashes % _BUCKETS, True)
        ordered, places = torch.cat([*past, hashes]).sort(stable=True)
        is_repeat = (ordered[1:] == ordered[:-1]) & (places[1:] >= len(ordered) - len(hashes))
        # A small data set comes round within the window, which is no fault.
        is_large = self._seen.sum() >= _TIMES * len(ordered)
        return {_COMPARED: is_large * float(len(hashes)), _REPEATED: is_large * is_repeat.sum()}

    def _measure(
        self, lengths: Tensor, is_one: Tensor, is_open: Tensor
    ) -> dict[str, Tensor | float]:
        """Counts rows of the longest length so far that have no end; each argument is [n]."""
        if self._lengths is None:
            self._lengths = torch.tensor([0, _NO_LENGTH, 0, 0])
        before, shortest, count, at_longest = self._lengths.to(lengths.device)
        longest = torch.maximum(before, (lengths * is_one).max())
        shortest = torch.minimum(shortest, lengths.masked_fill(~is_one, _NO_LENGTH).min())
        is_longest = is_one & (lengths == longest)
        count = count + is_one.sum()
        at_longest = at_longest * (longest == before) + is_longest.sum()
        self._lengths = torch.stack([longest, shortest, count, at_longest])
        do_vary = (count - at_longest >= _SHORTER * count) & (2 * shortest <= longest)
        do_vary = do_vary & (count >= _LEAST_ROWS)
        return {
            _MEASURED: do_vary * is_one.sum(),
            _CUT: do_vary * (is_longest & is_open).sum(),
        }

    @staticmethod
    def metrics(sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of a step from sums over all ranks; what is not known is absent."""
        found = {}
        if sums[_COMPARED] > 0:
            found["data/duplicate_rows/total"] = sums[_REPEATED] / sums[_COMPARED]
        if sums[_MEASURED] > 0:
            found["data/rows_at_longest/total"] = sums[_CUT] / sums[_MEASURED]
        return found


def _are_packed(batch: Mapping[str, Any], attended: Tensor) -> Tensor:
    """Returns whether each row holds several texts: its positions start anew [R]."""
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != attended.shape:
        return torch.zeros_like(attended[:, 0])
    positions = positions.to(attended.device)
    return ((positions[:, 1:] <= positions[:, :-1]) & attended[:, 1:] & attended[:, :-1]).any(1)

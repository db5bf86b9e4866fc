"""What batches say about themselves: whether labels fit the tokens, and which tokens are trained.

Nothing is copied to the host: the counts travel in the step's vector.

Legend: B rows, S tokens of a row, K buckets of token ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_monitor.probes.row_shares import RowShares
from ulysses_monitor.probes.token_set import TokenSet
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["BatchReader"]

BUCKETS = 1 << 15
"""Buckets of token ids, and of pairs; ids that are this far apart share one."""

_KEEP = 0.98
"""What the counts of earlier steps keep of their weight at each step."""

_SPREAD = 20_011
"""Spreads pairs of ids over the buckets: a prime."""

_NAMES = ("labels", "own", "copied", "ahead", "padded", "ends", "trained ends", "special")
_COUNTS = tuple(f"batch {n}" for n in _NAMES)
_LABELS, _OWN, _COPIED, _AHEAD, _PADDED, _ENDS, _TRAINED_ENDS, _SPECIAL = _COUNTS
_TOP, _OVERLAP, _COMPARED = "batch top", "batch overlap", "batch compared"
_SUMS = (*_COUNTS, _TOP, _OVERLAP, _COMPARED)


@dataclass(frozen=True)
class _Aligned:
    """Labels beside the tokens around them, each [B, S - 1].

    Attributes:
        labels: what is predicted from `before`; `IGNORE_INDEX` is not trained on.
        before: the token that a label is predicted from.
        own: the token at the label's place, which a causal language model learns to predict.
        padded: whether the label and the token before it are padding; None without a mask.
        attended: whether the token at the label's place is not padding; None without a mask.
    """

    labels: Tensor
    before: Tensor
    own: Tensor
    padded: Tensor | None
    attended: Tensor | None


class BatchReader:
    """Counts over a step's micro-batches; sums over ranks become ``data/*`` metrics.

    Args:
        ends: ids of the tokens that end a text.
        special: ids of the tokenizer's special tokens; none if they are not known.

    Attributes:
        SUMS: names of what `take_sums` returns.
    """

    SUMS = (*_SUMS, *RowShares.SUMS)

    def __init__(self, ends: Sequence[int] = (), special: Sequence[int] = ()) -> None:
        self._ends, self._special = TokenSet(ends), TokenSet(special)
        self._rows = RowShares(ends)
        self._usual: Tensor | None = None
        self._start_step()

    def _start_step(self) -> None:
        self._sums: dict[str, Tensor | float] = dict.fromkeys(_SUMS, 0.0)
        self._counts: Tensor | None = None

    def add(self, batch: Any, *, shifted: bool = True) -> None:
        """Counts a micro-batch.

        Args:
            batch: the mapping that a model is called with. Without ``input_ids`` and ``labels`` (or
                ``shift_labels``) of the same shape [B, S] it is left out.
            shifted: whether the loss compares a position with the label of the next one.
        """
        found = _align(batch, shifted)
        if found is None:
            return
        labels, trained = found.labels, found.labels != IGNORE_INDEX
        self._count(_LABELS, trained)
        self._count(_OWN, labels == found.own)
        self._count(_COPIED, labels == found.before)
        self._count(_AHEAD, labels[:, :-1] == found.own[:, 1:])
        if found.padded is not None:
            self._count(_PADDED, trained & found.padded)
        if self._special:
            self._count(_SPECIAL, self._special.has(labels))
        if self._ends:
            ends = self._ends.has(found.own)
            ends = ends if found.attended is None else ends & found.attended
            self._count(_ENDS, ends)
            self._count(_TRAINED_ENDS, ends & trained)
        pairs = labels + _SPREAD * found.before
        if self._counts is None:
            self._counts = torch.zeros(2, BUCKETS + 1, device=labels.device)
        for row, ids in zip(self._counts, (labels, pairs), strict=True):
            places = (ids % BUCKETS).masked_fill(~trained, BUCKETS).flatten()
            row.scatter_add_(0, places, torch.ones_like(places, dtype=row.dtype))
        self._rows.add(batch, labels)

    def _count(self, name: str, where: Tensor) -> None:
        self._sums[name] = self._sums[name] + where.sum()

    def miss(self) -> None:
        """Notes that a micro-batch could not be read: no rank has these metrics of the step."""
        self._sums[_LABELS] = math.nan

    def take_sums(self) -> dict[str, Tensor | float]:
        """Returns this rank's sums over the step, the same names on all ranks, and starts anew."""
        if self._counts is not None:
            self._sums[_TOP] = self._counts[0, :-1].max()
            self._compare(self._counts[1, :-1])
        sums = self._sums | self._rows.take_sums()
        self._start_step()
        return sums

    def _compare(self, counts: Tensor) -> None:
        """Compares the step's pairs of tokens with those of the steps before."""
        if self._usual is None:
            self._usual = counts.clone()
            return
        self._usual = self._usual.to(counts.device)
        size = (counts.sum() * self._usual.sum()).sqrt().clamp(min=1.0)
        self._sums[_OVERLAP] = (counts * self._usual).sqrt().sum() / size
        self._sums[_COMPARED] = (counts.sum() > 0).double()
        self._usual.mul_(_KEEP).add_(counts)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of a step from sums over all ranks; none if it had no labels."""
        labels = sums[_LABELS]
        if not labels > 0:
            return {}
        shares = {
            "data/label_own/total": _OWN,
            "data/label_copied/total": _COPIED,
            "data/label_ahead/total": _AHEAD,
            "data/label_padded/total": _PADDED,
            "data/dominant_token/total": _TOP,
        }
        if self._special:
            shares["data/special_tokens/total"] = _SPECIAL
        found = {name: sums[key] / labels for name, key in shares.items()}
        if sums[_ENDS] > 0:
            found["data/end_tokens/total"] = sums[_ENDS]
            found["data/end_trained/total"] = sums[_TRAINED_ENDS] / sums[_ENDS]
        if sums[_COMPARED] > 0:
            found["data/token_overlap/total"] = sums[_OVERLAP] / sums[_COMPARED]
        return found | RowShares.metrics(sums)


def _align(batch: Any, shifted: bool) -> _Aligned | None:
    """Returns a batch's labels with the tokens around them; None if they have not one shape."""
    if not isinstance(batch, Mapping):
        return None
    ids = batch.get("input_ids")
    ready = batch.get("shift_labels")
    labels = batch.get("labels") if ready is None else ready
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor)):
        return None
    if ids.dim() != 2 or ids.shape != labels.shape or ids.shape[1] < 2:
        return None
    ids = ids.to(labels.device)
    labels = labels[:, 1:] if shifted and ready is None else labels[:, :-1]
    mask = batch.get("attention_mask")
    padded = attended = None
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        is_padding = mask.to(labels.device) == 0
        padded, attended = is_padding[:, 1:] & is_padding[:, :-1], ~is_padding[:, 1:]
    return _Aligned(labels, ids[:, :-1], ids[:, 1:], padded, attended)

"""Counts the tokens of rows, and finds what is wrong in single rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ulysses_core.data.config import DataConfig
from ulysses_core.data.files import Row
from ulysses_core.data.health.duplicates import RowIndex
from ulysses_core.data.health.findings import Numbers, Spots
from ulysses_core.data.health.reading import Batch
from ulysses_core.data.health.texts import TextScanner, list_special_ids
from ulysses_core.data.health.views import View, list_texts, view_row
from ulysses_core.data.templates import get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITS", "RowCounter"]

SPLITS = ("train", "eval")
_TAIL = 4
"""Last tokens of an answer among which its end must be: templates may write a line break behind."""
_LONG, _DOMINANT = 32, 0.3
"""A row of so many tokens should not be one token to this share."""


class RowCounter:
    """Takes batches of rows, and counts.

    Args:
        tokenizer: the model's tokenizer.
        config: the data settings.

    Attributes:
        index: fingerprints of all rows.
        spots: rows by what is wrong with them.
        tokens: how often each token is in the rows to train on [V].
        trained: how often it has a label [V].
        desirable: rows of stage kto by their tag.
        answers: rows of which an answer is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._scanner = TextScanner(tokenizer, config.template)
        self._ends = _find_ends(tokenizer, config.template)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos = bos if bos != eos else None  # where they are one, two in a row end and begin
        self.index = RowIndex()
        self.spots: dict[str, Spots] = {}
        self.tokens = np.zeros(len(tokenizer), np.int64)
        self.trained = np.zeros(len(tokenizer), np.int64)
        self.desirable: Counter[bool] = Counter()
        self.answers = 0
        self._numbers: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
        self._sides = np.zeros(2)

    def count(self, batch: Batch) -> None:
        """Counts the rows of a batch."""
        numbers = self._numbers[batch.split]
        numbers["examples"] += len(batch.places)
        numbers["unreadable"] += len(batch.unreadable)
        for row, reason in batch.unreadable:
            self._spot(_name_problem(reason), row, reason)
        for place, example in zip(batch.places, batch.examples, strict=True):
            self._scan(place, list(list_texts(example)))
        kept: list[tuple[Row, View]] = []
        made = zip(batch.places, batch.rows, batch.why, batch.cut, strict=True)
        for place, tokens, why, cut in made:
            numbers["truncated"] += cut > 0
            if cut > 1:
                numbers["cut_answers"] += 1
                self._spot("cut_answers", place)
            elif cut:
                self._spot("truncated", place)
            if tokens is None:
                self._spot(_name_problem(why, otherwise="no_labels"), place, why)
            else:
                kept.append((place, view_row(tokens)))
                self._look(place, kept[-1][1], is_cut=cut > 0)
        self._add(batch.split, kept)

    def numbers(self, split: str) -> Numbers:
        """Returns a split in numbers; `index` must be finished."""
        chosen = self.index.splits == SPLITS.index(split)
        lengths, counted = self.index.lengths[chosen], self._numbers[split]
        rows = len(lengths)
        quantiles = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        names = ("chosen", "rejected") if self._sides.any() and split == "train" else ()
        return Numbers(
            **{
                name: int(counted[name])
                for name in ("examples", "unreadable", "truncated", "cut_answers")
            },
            rows=rows,
            tokens=int(counted["tokens"]),
            trained=int(counted["trained"]),
            lengths={n: int(np.quantile(lengths, q)) for n, q in quantiles.items() if rows},
            histogram=_histogram(lengths),
            sides={n: total / max(1, rows) for n, total in zip(names, self._sides, strict=False)},
        )

    def _scan(self, place: Row, texts: Sequence[str]) -> None:
        if mark := self._scanner.find_mark(texts):
            self._spot("role_markers", place, mark)
        if kinds := self._scanner.find_secrets(texts):
            is_sure = any(not kind.startswith("a value") for kind in kinds)
            self._spot("secrets" if is_sure else "possible_secrets", place, ", ".join(kinds))
        if self._scanner.has_address(texts):
            self._spot("addresses", place)

    def _look(self, place: Row, view: View, *, is_cut: bool) -> None:
        ids = view.ids
        if self._bos in ids and any(a == b == self._bos for a, b in pairwise(ids)):
            self._spot("bos_doubled", place)
        if view.ends and not is_cut:
            self.answers += 1
            if not all(self._ends.intersection(end[-_TAIL:]) for end in view.ends):
                self._spot("eos_missing", place)
        if view.is_desirable is not None:
            self.desirable[view.is_desirable] += 1
        if len(ids) >= _LONG and len(set(ids)) < (1 - _DOMINANT) * len(ids) + 1:
            token, times = Counter(ids).most_common(1)[0]
            if times > _DOMINANT * len(ids):
                self._spot("repetitive_rows", place, f"token {token} is {times / len(ids):.0%}")

    def _add(self, split: str, kept: Sequence[tuple[Row, View]]) -> None:
        if not kept:
            return
        views = [view for _, view in kept]
        numbers = self._numbers[split]
        numbers["tokens"] += sum(len(view.ids) for view in views)
        numbers["trained"] += sum(len(view.trained) for view in views)
        if split == "train":
            self.tokens += self._bin([view.ids for view in views])
            self.trained += self._bin([view.trained for view in views])
            sides = [view.sides for view in views if view.sides is not None]
            self._sides += np.array(sides).sum(axis=0) if sides else 0
        places = [place for place, _ in kept]
        self.index.add(places, [view.ids for view in views], SPLITS.index(split))

    def _bin(self, rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        ids = np.fromiter(chain.from_iterable(rows), np.int64)
        return np.bincount(ids, minlength=len(self.tokens))[: len(self.tokens)]

    def _spot(self, name: str, row: Row, detail: str = "") -> None:
        self.spots.setdefault(name, Spots()).add(row.where, detail)


_PROBLEMS = {
    "answer are equal": "identical_sides",
    "answers do not differ": "identical_sides",
    "(chosen) is empty": "empty_sides",
    "(rejected) is empty": "empty_sides",
}
"""What the messages about preference pairs say."""


def _name_problem(reason: str, otherwise: str = "unreadable_rows") -> str:
    return next((name for part, name in _PROBLEMS.items() if part in reason), otherwise)


def _find_ends(tokenizer: PreTrainedTokenizerBase, template: str | None) -> set[Any]:
    """Returns the tokens that may end an answer: any special token but those that begin or pad."""
    ends: set[Any] = list_special_ids(tokenizer)
    ends -= {tokenizer.bos_token_id, tokenizer.pad_token_id}
    ends |= {tokenizer.eos_token_id} - {None}
    stop = get_template(template).stop if template else None
    if stop:
        ends.update(tokenizer(stop, add_special_tokens=False)["input_ids"][-1:])
    return ends


def _histogram(lengths: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Returns the number of rows by bins, four an octave; a bin is named by its upper end."""
    if not len(lengths):
        return []
    octaves = int(lengths.max()).bit_length()
    edges = np.unique(np.ceil(2.0 ** (np.arange(4 * octaves + 1) / 4)).astype(np.int64))
    counts = np.bincount(np.searchsorted(edges, lengths, side="left"), minlength=len(edges))
    return [(int(edge), int(n)) for edge, n in zip(edges, counts, strict=False)]

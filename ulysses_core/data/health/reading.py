"""Reads and tokenises the rows of a config a batch at a time, and keeps track of where each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.files import Row, iterate_rows
from ulysses_core.data.kinds import check_kind
from ulysses_core.data.registry import DatasetSpec, find_datasets
from ulysses_core.data.sources import RowPlan
from ulysses_core.data.stats import DataStats
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "read_batches", "unpacked"]

_WHOLE = 1 << 30
"""Tokens of a document that is not cut."""


@dataclass(frozen=True)
class Batch:
    """Some rows of one split, as they were read and as they were tokenised.

    Attributes:
        split: ``train`` or ``eval``.
        places: where the rows that could be read are.
        examples: what they hold.
        rows: what the trainer gets of each; None if that is nothing.
        why: why the trainer gets nothing of a row.
        cut: for each row whether it was cut at ``cutoff_len``: 1, and 2 if an answer was.
        unreadable: the rows that could not be read, with the reason.
    """

    split: str
    places: Sequence[Row] = ()
    examples: Sequence[Any] = ()
    rows: Sequence[dict[str, Any] | None] = ()
    why: Sequence[str] = ()
    cut: Sequence[int] = ()
    unreadable: Sequence[tuple[Row, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places) + len(self.unreadable)


def read_batches(
    config: DataConfig, plan: RowPlan, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Batch]:
    """Yields all rows to train on, then all rows to evaluate on.

    Rows are not packed, and `num_samples` draws nothing: each row counts once.

    Args:
        config: the data settings; see `unpacked`.
        plan: how the stage reads rows and turns them into tokens.
        tokenizer: the model's tokenizer.

    Raises:
        InputError: the config or a file is wrong.
    """
    for split, names in (("train", config.dataset), ("eval", config.eval_dataset)):
        for spec in find_datasets(names, config.dataset_dir):
            check_kind(spec, plan.name, plan.kind)
            rows = islice(iterate_rows(spec.path, spec.split), config.max_samples)
            while batch := list(islice(rows, config.preprocessing_batch_size)):
                yield _tokenise(_convert(split, batch, spec, plan), plan, tokenizer, config)


def unpacked(config: DataConfig, plan: RowPlan) -> DataConfig:
    """Returns the settings with which each example is a row of its own, cut as it is if packed."""
    changes: dict[str, Any] = {"packing": False, "neat_packing": False}
    if plan.kind == "documents" and config.packing is not False:
        changes["cutoff_len"] = _WHOLE  # packed documents are cut into blocks, and nothing is lost
    return config.model_copy(update=changes)


def _convert(split: str, batch: Sequence[Row], spec: DatasetSpec, plan: RowPlan) -> Batch:
    places, examples, unreadable = list[Row](), list[Any](), list[tuple[Row, str]]()
    for row in batch:
        try:
            examples.append(plan.convert(row, spec))
            places.append(replace(row, values={}))  # what the row held is in the example
        except InputError as error:
            reason = str(error).removeprefix(row.where).lstrip(":, ")
            unreadable.append((replace(row, values={}), reason))
    return Batch(split, places, examples, unreadable=unreadable)


def _tokenise(
    batch: Batch, plan: RowPlan, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Batch:
    """Tokenises all rows at once; one by one if some are cut or left out, to know which."""
    if not batch.examples:
        return batch
    rows, stats = plan.tokenize(batch.examples, tokenizer, config)
    if len(rows) == len(batch.examples) and not stats.truncated:
        plain = [0] * len(rows)
        return replace(batch, rows=rows, why=[""] * len(rows), cut=plain)
    found = [plan.tokenize([each], tokenizer, config) for each in batch.examples]
    return replace(
        batch,
        rows=[each[0] if each else None for each, _ in found],
        why=[_reason(told, place) for (_, told), place in zip(found, batch.places, strict=True)],
        cut=[told.truncated + told.cut_answers for _, told in found],
    )


def _reason(stats: DataStats, place: Row) -> str:
    return stats.first_dropped.removeprefix(place.where).lstrip(":, ")

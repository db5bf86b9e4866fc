"""The text of a row, from the data that was trained on; secrets are masked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.masking import mask_secrets, mask_text
from ulysses_monitor.records.rows import Row

__all__ = ["RowText", "texts_of_config", "texts_of_data"]

_LONGEST = 2000
"""Characters of a text; masking long words takes the square of their length."""
_MORE = 200
"""Characters that are masked beyond them, so that no secret is cut and then shown."""

_ROWS = (
    ("input_ids",),
    ("prompt_ids", "completion_ids"),
    ("prompt_ids", "chosen_ids"),
    ("prompt_ids", "rejected_ids"),
    ("chosen_ids",),
    ("rejected_ids",),
)
"""Columns of token ids that make a row, one after the other."""


@dataclass(frozen=True)
class RowText:
    """The text of a row.

    Attributes:
        text: it, or None if it is not there.
        note: what is not sure about it, or why it is not there; empty if it is that of the row.
    """

    text: str | None
    note: str = ""


def texts_of_config(path: Path) -> Callable[[Row], RowText]:
    """Returns a function that decodes rows of a config's training data.

    A text is that of the row if the tokens have the row's hash. Rows without an index are found by
    it.

    Raises:
        InputError: the config or its data is wrong, or has no rows to train on.
    """
    from ulysses_core.data import load_datasets
    from ulysses_core.trainers.build import build_tokenizer
    from ulysses_core.trainers.stage import find_stage, load_config

    config = load_config(path)
    tokenizer = build_tokenizer(config.model)
    seed = config.training.get("seed", 42)
    data = load_datasets(config.data, find_stage(config.finetuning.stage), tokenizer, seed).train
    if data is None or config.data.streaming:
        raise InputError(
            f"rows: --config is {path}; expected a config with a dataset that is not streamed"
        )
    by_hash: dict[str, int] = {}

    def find(row: Row) -> RowText:
        index = row.index
        if index is None:
            if not by_hash:
                by_hash.update((h, i) for i in range(len(data)) for h, _ in _rows_in(data[i]))
            index = by_hash.get(row.hash)
        if index is None or index >= len(data):
            return RowText(None, "not in the data of this config")
        found = list(_rows_in(data[index]))
        for digest, ids in found:
            if digest == row.hash:
                return RowText(_limit(tokenizer.decode(ids)))
        if not found:
            return RowText(None, "its columns hold no tokens")
        text = " | ".join(tokenizer.decode(ids) for _, ids in found)
        return RowText(_limit(text), "other tokens: the data or the template has changed")

    return find


def texts_of_data(path: Path, rows: Iterable[Row]) -> Callable[[Row], RowText]:
    """Returns a function that gives rows of a file, or of a folder that `datasets` saved.

    Args:
        path: the file or folder.
        rows: the rows that will be asked for.

    Raises:
        InputError: it cannot be read.
    """
    wanted = {row.index for row in rows if row.index is not None}
    held = {i: mask_secrets(_cut(record)) for i, record in _records(path, wanted) if i in wanted}

    def find(row: Row) -> RowText:
        if row.index is None:
            return RowText(None, "its place in the dataset is not known")
        if row.index not in held:
            return RowText(None, f"{path.name} has fewer rows")
        return RowText(_limit(json.dumps(held[row.index], ensure_ascii=False, default=str)))

    return find


def _records(path: Path, wanted: Collection[int]) -> Iterator[tuple[int, Any]]:
    """Yields records and their places, at least those that are `wanted` and there."""
    if path.is_dir():
        from datasets import load_from_disk

        try:
            data: Any = load_from_disk(str(path))
            yield from ((i, data[i]) for i in sorted(wanted) if i < len(data))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(_refuse(path, str(error))) from None
        return
    from ulysses_core.data.readers import READERS

    if path.suffix not in READERS or not path.is_file():
        raise InputError(_refuse(path, "there is no such file of rows"))
    last = max(wanted, default=-1)
    read = enumerate(record for _, record in READERS[path.suffix](path))
    yield from itertools.takewhile(lambda pair: pair[0] <= last, read)


def _refuse(path: Path, why: str) -> str:
    return (
        f"rows: --data is {path}, which cannot be read ({' '.join(why.split())[:200]}); expected a "
        "file of rows (.json, .jsonl, .csv, .parquet, .txt) or a folder that save_to_disk wrote"
    )


def _rows_in(record: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[int]]]:
    """Yields the hash and the tokens of what may be a row of a batch."""
    import torch

    from ulysses_monitor.probes.fingerprints import hash_rows

    for columns in _ROWS:
        parts = [record.get(name) for name in columns]
        if all(isinstance(part, list) and part for part in parts):
            ids = [token for part in parts for token in part or ()]
            yield f"{int(hash_rows(torch.tensor([ids]))):013x}", ids


def _limit(text: str) -> str:
    masked = mask_text(text[: _LONGEST + _MORE])
    return masked if len(masked) <= _LONGEST else masked[: _LONGEST - 3] + "..."


def _cut(value: Any) -> Any:
    """Returns a record without the ends of its long texts."""
    if isinstance(value, str):
        return value[: _LONGEST + _MORE]
    if isinstance(value, Mapping):
        return {key: _cut(each) for key, each in value.items()}
    return [_cut(each) for each in value] if isinstance(value, list) else value

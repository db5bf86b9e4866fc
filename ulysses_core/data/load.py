"""From the config to tokenised datasets, and the cheap check of the same sources."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig, Stage
from ulysses_core.data.examples import check_spec, to_document, to_example
from ulysses_core.data.files import Row, read_rows
from ulysses_core.data.packing import TokenRow
from ulysses_core.data.registry import DatasetSpec, find_datasets
from ulysses_core.data.templates import get_template
from ulysses_core.data.tokenize import DataStats, tokenize_pt, tokenize_sft
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["DatasetPair", "check_sources", "load_datasets"]


@dataclass(frozen=True)
class _StagePlan:
    """How a stage reads a row, and how it tokenises what it read."""

    convert: Callable[[Row, DatasetSpec], Any]
    tokenize: Callable[[Any, PreTrainedTokenizerBase, DataConfig], tuple[list[TokenRow], DataStats]]


_STAGES: dict[Stage, _StagePlan] = {
    "pt": _StagePlan(to_document, tokenize_pt),
    "sft": _StagePlan(to_example, tokenize_sft),
}


@dataclass(frozen=True)
class DatasetPair:
    """The rows to train on and to evaluate on, either of which may be absent.

    Rows hold `input_ids` and `labels`, and `position_ids` where documents are packed apart.
    """

    train: Dataset | None
    eval: Dataset | None
    stats: dict[str, DataStats]
    """Counts, under `train` and `eval`."""


def load_datasets(
    config: DataConfig, stage: Stage, tokenizer: PreTrainedTokenizerBase, seed: int = 42
) -> DatasetPair:
    """Reads, tokenises, truncates and packs the datasets of `config`.

    Args:
        config: The data settings.
        stage: What the rows are for.
        tokenizer: Of the model to be trained.
        seed: Of the split by `val_size`, and of `num_samples`.

    Raises:
        InputError: Something in the config, the files or the rows is wrong; the message says where.
    """
    _need_datasets(config)
    examples = {
        "train": _read(config.dataset, config, stage, seed),
        "eval": _read(config.eval_dataset, config, stage, seed),
    }
    if config.val_size:
        examples["train"], examples["eval"] = _split(examples["train"], config.val_size, seed)
    datasets: dict[str, Dataset | None] = {"train": None, "eval": None}
    stats: dict[str, DataStats] = {}
    for split, found in examples.items():
        if found:
            rows, stats[split] = _STAGES[stage].tokenize(found, tokenizer, config)
            datasets[split] = _as_dataset(rows)
    return DatasetPair(datasets["train"], datasets["eval"], stats)


def check_sources(config: DataConfig, stage: Stage = "sft") -> dict[str, int]:
    """Reads every row of every dataset without tokenising, so that bad input shows at once.

    Loads neither torch nor transformers nor datasets.

    Returns:
        The number of rows of each dataset.

    Raises:
        InputError: Something in the config, the files or the rows is wrong; the message says where.
    """
    _need_datasets(config)
    if config.template is not None:
        get_template(config.template)
    names = list(dict.fromkeys([*config.dataset, *config.eval_dataset]))
    specs = find_datasets(names, config.dataset_dir)
    return {spec.name: len(_convert(spec, stage)) for spec in specs}


def _need_datasets(config: DataConfig) -> None:
    if not config.dataset and not config.eval_dataset:
        raise InputError(
            "no dataset is set: give dataset (or eval_dataset) a name in dataset_info.json"
        )


def _convert(spec: DatasetSpec, stage: Stage) -> list[Any]:
    rows = read_rows(spec.path)
    check_spec(rows, spec, stage)
    return [_STAGES[stage].convert(row, spec) for row in rows]


def _read(names: Sequence[str], config: DataConfig, stage: Stage, seed: int) -> list[Any]:
    examples: list[Any] = []
    for spec in find_datasets(names, config.dataset_dir):
        found = _convert(spec, stage)
        if spec.num_samples is not None:
            found = _sample(found, spec.num_samples, seed)
        examples += found[: config.max_samples]
    return examples


def _sample(examples: list[Any], count: int, seed: int) -> list[Any]:
    """Draws `count` examples in random order, all of them once before any repeats."""
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    shuffled = draw.sample(examples, k=min(count, len(examples)))
    return shuffled + draw.choices(examples, k=count - len(shuffled))


def _split(examples: list[Any], val_size: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Splits examples, not rows: a packed row could not be split between train and eval."""
    import datasets

    size = val_size if val_size < 1 else int(val_size)
    indices = datasets.Dataset.from_dict({"index": list(range(len(examples)))})
    try:
        parts = indices.train_test_split(test_size=size, seed=seed)
    except ValueError:
        raise InputError(
            f"val_size={size} leaves no row to train on: dataset has {len(examples)} rows"
        ) from None
    return (
        [examples[index] for index in parts["train"]["index"]],
        [examples[index] for index in parts["test"]["index"]],
    )


def _as_dataset(rows: Sequence[TokenRow]) -> Dataset:
    import datasets

    columns = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
    }
    if rows[0].position_ids is not None:
        columns["position_ids"] = [row.position_ids or [] for row in rows]
    return datasets.Dataset.from_dict(columns)

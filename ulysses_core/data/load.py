"""Loads the datasets of a config as tokenised rows, and checks their files without tokenising."""

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
    """How a stage converts a row to an example, and how it tokenises examples."""

    convert: Callable[[Row, DatasetSpec], Any]
    tokenize: Callable[[Any, PreTrainedTokenizerBase, DataConfig], tuple[list[TokenRow], DataStats]]


_STAGES: dict[Stage, _StagePlan] = {
    "pt": _StagePlan(to_document, tokenize_pt),
    "sft": _StagePlan(to_example, tokenize_sft),
}


@dataclass(frozen=True)
class DatasetPair:
    """The rows to train on and to evaluate on; either may be None.

    Rows have `input_ids` and `labels`, and also `position_ids` if packed documents are separated.
    """

    train: Dataset | None
    eval: Dataset | None
    stats: dict[str, DataStats]
    """Statistics by split: `train` and `eval`."""


def load_datasets(
    config: DataConfig, stage: Stage, tokenizer: PreTrainedTokenizerBase, seed: int = 42
) -> DatasetPair:
    """Reads, tokenises, truncates and packs the datasets of `config`.

    Args:
        config: The data settings.
        stage: The stage of training.
        tokenizer: The model's tokenizer.
        seed: Seeds the split by `val_size` and the sampling by `num_samples`.

    Raises:
        InputError: The config, a file or a row is wrong; the message says where.
    """
    _require_datasets(config)
    examples = {
        "train": _read(config.dataset, config, stage, seed),
        "eval": _read(config.eval_dataset, config, stage, seed),
    }
    if config.val_size:
        examples["train"], examples["eval"] = _split(examples["train"], config.val_size, seed)
    datasets: dict[str, Dataset | None] = {"train": None, "eval": None}
    stats: dict[str, DataStats] = {}
    for split, of_split in examples.items():
        if of_split:
            rows, stats[split] = _STAGES[stage].tokenize(of_split, tokenizer, config)
            datasets[split] = _as_dataset(rows)
    return DatasetPair(datasets["train"], datasets["eval"], stats)


def check_sources(config: DataConfig, stage: Stage = "sft") -> dict[str, int]:
    """Reads every row of every dataset without tokenising, to find wrong input early.

    Imports neither torch nor transformers nor datasets.

    Returns:
        The number of rows by dataset.

    Raises:
        InputError: The config, a file or a row is wrong; the message says where.
    """
    _require_datasets(config)
    if config.template is not None:
        get_template(config.template)
    names = list(dict.fromkeys([*config.dataset, *config.eval_dataset]))
    specs = find_datasets(names, config.dataset_dir)
    return {spec.name: len(_convert(spec, stage)) for spec in specs}


def _require_datasets(config: DataConfig) -> None:
    if not config.dataset and not config.eval_dataset:
        raise InputError(
            "dataset is not set; set dataset or eval_dataset to a name in dataset_info.json"
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
    """Draws `count` examples in random order; none repeats before all are drawn."""
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    shuffled = draw.sample(examples, k=min(count, len(examples)))
    return shuffled + draw.choices(examples, k=count - len(shuffled))


def _split(examples: list[Any], val_size: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Splits examples, because a packed row cannot be split between train and eval."""
    import datasets

    size = val_size if val_size < 1 else int(val_size)
    indices = datasets.Dataset.from_dict({"index": list(range(len(examples)))})
    try:
        parts = indices.train_test_split(test_size=size, seed=seed)
    except ValueError:
        raise InputError(
            f"val_size is {size}, which leaves no examples to train on; the dataset has "
            f"{len(examples)}"
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

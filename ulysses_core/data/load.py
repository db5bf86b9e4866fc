"""Loads the datasets of a config as tokenised rows, and checks their files without tokenising."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ulysses_core.data.config import DataConfig
from ulysses_core.data.files import Row, read_rows
from ulysses_core.data.kinds import Kind, check_columns, check_kind
from ulysses_core.data.registry import DatasetSpec, find_datasets
from ulysses_core.data.templates import get_template
from ulysses_core.data.tokenize import DataStats
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["DatasetPair", "RowPlan", "check_sources", "load_datasets"]

logger = logging.getLogger(__name__)


class RowPlan(Protocol):
    """How a stage reads rows and turns them into tokens."""

    @property
    def name(self) -> str:
        """The stage."""

    @property
    def kind(self) -> Kind:
        """What the rows of its datasets hold."""

    def convert(self, row: Row, spec: DatasetSpec) -> Any:
        """Returns the example of a row, or raises `InputError`."""

    def tokenize(
        self, examples: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig
    ) -> tuple[list[dict[str, Any]], DataStats]:
        """Returns rows with the columns that the stage's collator takes."""


@dataclass(frozen=True)
class DatasetPair:
    """The rows to train on and to evaluate on; either may be None."""

    train: Dataset | None
    eval: Dataset | None
    stats: dict[str, DataStats]
    """Statistics by split: `train` and `eval`."""


def load_datasets(
    config: DataConfig, plan: RowPlan, tokenizer: PreTrainedTokenizerBase, seed: int = 42
) -> DatasetPair:
    """Reads, tokenises, truncates and packs the datasets of `config`.

    Args:
        config: The data settings.
        plan: How the stage of training reads rows and turns them into tokens.
        tokenizer: The model's tokenizer.
        seed: Seeds the split by `val_size` and the sampling by `num_samples`.

    Raises:
        InputError: The config, a file or a row is wrong; the message says where.
    """
    _require_datasets(config)
    examples = {
        "train": _read(config.dataset, config, plan, seed),
        "eval": _read(config.eval_dataset, config, plan, seed),
    }
    if config.val_size:
        examples["train"], examples["eval"] = _split(examples["train"], config.val_size, seed)
    datasets: dict[str, Dataset | None] = {"train": None, "eval": None}
    stats: dict[str, DataStats] = {}
    for split, of_split in examples.items():
        if of_split:
            rows, stats[split] = plan.tokenize(of_split, tokenizer, config)
            datasets[split] = _as_dataset(rows)
    return DatasetPair(datasets["train"], datasets["eval"], stats)


def check_sources(config: DataConfig, plan: RowPlan) -> dict[str, int]:
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
    return {spec.name: len(_convert(spec, config, plan)) for spec in specs}


def _require_datasets(config: DataConfig) -> None:
    if not config.dataset and not config.eval_dataset:
        raise InputError(
            "dataset is not set; set dataset or eval_dataset to a name in dataset_info.json"
        )


def _convert(spec: DatasetSpec, config: DataConfig, plan: RowPlan) -> list[Any]:
    rows = read_rows(spec.path)
    check_kind(spec, plan.name, plan.kind)
    check_columns(rows, spec)
    if config.bad_rows == "refuse":
        return [plan.convert(row, spec) for row in rows]
    examples, problems = [], []
    for row in rows:
        try:
            examples.append(plan.convert(row, spec))
        except InputError as error:
            problems.append(str(error))
    if problems:
        logger.warning(
            "dataset %r: left out %d of %d rows; the first: %s",
            spec.name,
            len(problems),
            len(rows),
            problems[0],
        )
    if not examples:
        raise InputError(f"dataset {spec.name!r}: no row is left to train on; {problems[0]}")
    return examples


def _read(names: Sequence[str], config: DataConfig, plan: RowPlan, seed: int) -> list[Any]:
    examples: list[Any] = []
    for spec in find_datasets(names, config.dataset_dir):
        found = _convert(spec, config, plan)
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


def _as_dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    import datasets

    return datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})

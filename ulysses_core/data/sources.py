"""Reads the examples of a config's datasets: rows become examples, datasets become one list."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from ulysses_core.data.config import DataConfig
from ulysses_core.data.files import Row, iterate_rows
from ulysses_core.data.kinds import Kind, check_columns, check_kind
from ulysses_core.data.registry import DatasetSpec, find_datasets
from ulysses_core.data.stats import DataStats
from ulysses_core.data.templates import get_template
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "RowPlan",
    "check_sources",
    "convert_rows",
    "mix",
    "read_examples",
    "split_examples",
]

logger = logging.getLogger(__name__)

_HEAD = 1000  # rows of each dataset that are looked at before anything starts
_STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


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

    def find_problem(self, examples: Any) -> str:
        """Returns what is wrong with all examples together; empty if nothing is."""

    def tokenize(
        self, examples: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig
    ) -> tuple[list[dict[str, Any]], DataStats]:
        """Returns rows with the columns that the stage's collator takes."""


def check_sources(config: DataConfig, plan: RowPlan) -> None:
    """Looks at the datasets of a config and their first rows, to find wrong input early.

    Imports neither torch nor transformers nor datasets for files of JSON and text.

    Raises:
        InputError: The config, a file or one of the first rows is wrong; the message says where.
    """
    if not config.dataset and not config.eval_dataset:
        raise InputError(
            "dataset is not set; set dataset or eval_dataset to a name in dataset_info.json"
        )
    if config.template is not None:
        get_template(config.template)
    names = list(dict.fromkeys([*config.dataset, *config.eval_dataset]))
    for spec in find_datasets(names, config.dataset_dir):
        rows = list(islice(iterate_rows(spec.path, spec.split), _HEAD + 1))
        check_kind(spec, plan.name, plan.kind)
        if len(rows) <= _HEAD:
            check_columns(rows, spec)
        try:
            list(convert_rows(iter(rows), spec, config, plan, []))
        except InputError:
            check_columns(rows, spec)  # whose message is clearer if a column is nowhere
            raise


def read_examples(
    names: Sequence[str], config: DataConfig, plan: RowPlan, seed: int
) -> dict[str, list[Any]]:
    """Returns the examples of each dataset, after `num_samples` and `max_samples`.

    Raises:
        InputError: The config, a file or a row is wrong; the message says where.
    """
    examples: dict[str, list[Any]] = {}
    for spec in find_datasets(names, config.dataset_dir):
        found = _convert_all(spec, config, plan)
        if spec.num_samples is not None:
            found = _sample(found, spec.num_samples, seed)
        examples[spec.name] = found[: config.max_samples]
    return examples


def _convert_all(spec: DatasetSpec, config: DataConfig, plan: RowPlan) -> list[Any]:
    check_kind(spec, plan.name, plan.kind)
    is_limited = config.max_samples is not None and spec.num_samples is None
    rows = list(iterate_rows(spec.path, spec.split)) if not is_limited else []
    if rows:
        check_columns(rows, spec)
    problems: list[str] = []
    stream = iter(rows) if rows else iterate_rows(spec.path, spec.split)
    converted = convert_rows(stream, spec, config, plan, problems)
    examples = list(islice(converted, config.max_samples if is_limited else None))
    if problems:
        logger.warning(
            "dataset %r: left out %d of %d rows; the first: %s",
            spec.name,
            len(problems),
            len(problems) + len(examples),
            problems[0],
        )
    if not examples:
        raise InputError(f"dataset {spec.name!r}: no row is left to train on; {problems[0]}")
    return examples


def convert_rows(
    rows: Iterator[Row], spec: DatasetSpec, config: DataConfig, plan: RowPlan, problems: list[str]
) -> Iterator[Any]:
    """Yields the examples of rows; with `bad_rows: skip` adds what is wrong with others.

    Raises:
        InputError: A row is wrong, and `bad_rows` is `refuse`.
    """
    for row in rows:
        try:
            yield plan.convert(row, spec)
        except InputError as error:
            if config.bad_rows == "refuse":
                raise
            problems.append(str(error))


def _sample(examples: list[Any], count: int, seed: int) -> list[Any]:
    """Draws `count` examples in random order; none repeats before all are drawn."""
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    shuffled = draw.sample(examples, k=min(count, len(examples)))
    return shuffled + draw.choices(examples, k=count - len(shuffled))


def mix(parts: Sequence[list[Any]], config: DataConfig, seed: int) -> list[Any]:
    """Returns the examples of several datasets as one list, by `mix_strategy`."""
    if len(parts) == 1 or config.mix_strategy == "concat":
        return [example for part in parts for example in part]
    import datasets

    places = [
        datasets.Dataset.from_dict({"part": [number] * len(part), "at": list(range(len(part)))})
        for number, part in enumerate(parts)
    ]
    order = datasets.interleave_datasets(
        places,
        probabilities=config.interleave_probs,
        seed=seed,
        stopping_strategy=_STOPPING[config.mix_strategy],
    )
    return [parts[part][at] for part, at in zip(order["part"], order["at"], strict=True)]


def split_examples(examples: list[Any], val_size: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Splits examples, because a packed row cannot be split between train and eval.

    Raises:
        InputError: `val_size` leaves no examples to train on.
    """
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

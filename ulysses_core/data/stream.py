"""Rows that are read and tokenised while the training runs, with few of them in memory."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.files import iterate_rows
from ulysses_core.data.kinds import check_kind
from ulysses_core.data.registry import DatasetSpec, find_datasets
from ulysses_core.data.sources import RowPlan, convert_rows
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["stream_examples", "tokenise_stream"]

logger = logging.getLogger(__name__)


def stream_examples(config: DataConfig, plan: RowPlan, seed: int) -> IterableDataset:
    """Returns the examples of `dataset`, mixed and in the order of the files.

    Raises:
        InputError: An entry of a dataset is wrong, or is for another stage.
    """
    import datasets

    specs = tuple(find_datasets(config.dataset, config.dataset_dir))
    for spec in specs:
        check_kind(spec, plan.name, plan.kind)
        if spec.num_samples is not None:
            raise InputError(
                f"dataset {spec.name!r}: num_samples is {spec.num_samples}, which streaming does "
                "not allow, because the length of a stream is unknown; remove it"
            )
    # One stream: of several, accelerate would give each process its own, of another length.
    source = {"specs": specs, "config": config, "plan": plan, "seed": seed}
    return datasets.IterableDataset.from_generator(_iterate_all, gen_kwargs=source)


def _iterate_all(
    specs: tuple[DatasetSpec, ...], config: DataConfig, plan: RowPlan, seed: int
) -> Iterator[dict[str, Any]]:
    rows = _mix(specs, config, plan, seed)
    yield from islice(rows, int(config.val_size))  # held out; `load` checks them
    yield from _check_together(rows, config, plan)


def _check_together(
    rows: Iterator[dict[str, Any]], config: DataConfig, plan: RowPlan
) -> Iterator[dict[str, Any]]:
    """Yields rows, and says what is wrong with all of them together once that is known.

    That is at the end of the stream, which comes before the first step if it is no longer than the
    buffer that rows are drawn from. A longer one gets a warning when the buffer is full.

    Raises:
        InputError: something is wrong, and `bad_rows` is `refuse`.
    """
    first: Any = None
    count, is_right = 0, False
    for row in rows:
        if not is_right:
            first, count = row["example"] if first is None else first, count + 1
            is_right = not plan.find_problem([first, row["example"]])
            if not is_right and count == config.buffer_size:
                _warn(f"so far, {plan.find_problem([first] * count)}")
        yield row
    if is_right or first is None:
        return
    problem = plan.find_problem([first] * count)
    if config.bad_rows == "refuse":
        raise InputError(f"{problem}; change it, or set bad_rows: skip")
    _warn(problem)


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


def _mix(
    specs: tuple[DatasetSpec, ...], config: DataConfig, plan: RowPlan, seed: int
) -> Iterator[dict[str, Any]]:
    if len(specs) == 1 or config.mix_strategy == "concat":
        for spec in specs:
            yield from _iterate(spec, config, plan)
        return
    restart = [partial(_iterate, spec, config, plan) for spec in specs]
    streams = [make() for make in restart]
    used_up: set[int] = set()
    for number in _draw(len(specs), config.interleave_probs, seed):
        if number in used_up and config.mix_strategy == "interleave_once":
            continue
        example = next(streams[number], None)
        if example is None:
            used_up.add(number)
            if config.mix_strategy == "interleave_under" or len(used_up) == len(specs):
                return
            if config.mix_strategy == "interleave_over":
                streams[number] = restart[number]()
                example = next(streams[number], None)
        if example is not None:
            yield example


def _draw(count: int, shares: Sequence[float] | None, seed: int) -> Iterator[int]:
    """Yields the numbers of streams, in turn or at random by their shares."""
    if shares is None:
        yield from cycle(range(count))
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    while True:
        yield from draw.choices(range(count), shares)


def _iterate(spec: DatasetSpec, config: DataConfig, plan: RowPlan) -> Iterator[dict[str, Any]]:
    problems: list[str] = []
    rows = iterate_rows(spec.path, spec.split)
    for example in convert_rows(rows, spec, config, plan, problems):
        yield {"example": example}
    if problems:
        logger.warning(
            "dataset %r: left out %d rows; the first: %s", spec.name, len(problems), problems[0]
        )


def _tell_once(told: set[str], what: str, where: str) -> None:
    """Logs the first of what is wrong in a stream, whose end may never come."""
    if where and what not in told:
        told.add(what)
        _warn(f"{what}; the first: {where}")


def tokenise_stream(
    examples: IterableDataset,
    config: DataConfig,
    plan: RowPlan,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> IterableDataset:
    """Returns the rows of examples, which are drawn from a buffer in another order each epoch.

    Rows are packed, if the config says so, among `preprocessing_batch_size` examples.
    """
    told: set[str] = set()

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows, stats = plan.tokenize(batch["example"], tokenizer, config)
        if stats.first_dropped and config.bad_rows == "refuse":
            raise InputError(f"{stats.first_dropped}; change it, or set bad_rows: skip")
        _tell_once(told, "an example is left out", stats.first_dropped)
        _tell_once(told, "an answer is cut off at cutoff_len", stats.first_cut)
        return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}

    return examples.shuffle(seed=seed, buffer_size=config.buffer_size).map(
        tokenise,
        batched=True,
        batch_size=config.preprocessing_batch_size,
        remove_columns=["example"],
    )

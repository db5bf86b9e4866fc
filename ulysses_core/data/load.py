"""Loads the datasets of a config as tokenised rows, which one process reads for all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.identity import DATASET_KEYS, describe_rows, hash_json
from ulysses_core.data.sources import RowPlan, mix, read_examples, split_examples
from ulysses_core.data.stats import DataStats
from ulysses_core.data.store import (
    DatasetPair,
    Split,
    as_dataset,
    default_folder,
    is_written,
    open_rows,
    read_description,
    write_rows,
)
from ulysses_core.data.stream import stream_examples, tokenise_stream
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_datasets"]

logger = logging.getLogger(__name__)


def load_datasets(
    config: DataConfig,
    plan: RowPlan,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 42,
    device: torch.device | None = None,
) -> DatasetPair:
    """Returns the rows of a config's datasets, tokenised, truncated and packed.

    One process of each node reads the files and writes the rows to disk, or finds the same rows
    there; then all processes open them. In a distributed run every process must call it.

    Args:
        config: The data settings.
        plan: How the stage of training reads rows and turns them into tokens.
        tokenizer: The model's tokenizer.
        seed: Seeds the split by `val_size`, the sampling by `num_samples` and the mix.
        device: Device of the tensors that processes exchange; None on a single process.

    Raises:
        InputError: The config, a file or a row is wrong; the message says where.
    """
    path = config.tokenized_path
    if not config.dataset and not config.eval_dataset and not (path and is_written(path)):
        raise InputError(
            "dataset is not set; set dataset or eval_dataset to a name in dataset_info.json"
        )
    if config.streaming and not (path and is_written(path)):
        return _load_stream(config, plan, tokenizer, seed, device)
    described = describe_rows(config, plan, tokenizer, seed)
    folder = path or default_folder(hash_json(described))

    def prepare() -> None:
        if is_written(folder) and (path or not config.overwrite_cache):
            if path:
                _check_description(folder, described, config)
            return
        write_rows(folder, _tokenise(config, plan, tokenizer, seed), described)

    _run_first(prepare, device, is_shared=config.data_shared_file_system)
    pair = open_rows(folder)
    _report(pair.stats)
    if config.streaming and pair.train is not None:
        return replace(pair, train=pair.train.to_iterable_dataset())
    return pair


def _load_stream(
    config: DataConfig,
    plan: RowPlan,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device | None,
) -> DatasetPair:
    """Streams the rows to train on. Rows to evaluate on are few; all of them are tokenised.

    With `val_size` the first examples of the stream are held out.
    """
    if config.tokenized_path:
        raise InputError(
            f"tokenized_path {config.tokenized_path} is not written yet, which streaming does not "
            "do; run once without streaming"
        )
    held_out = config.model_copy(update={"dataset": [], "streaming": False})
    pair = DatasetPair(None, None, {})
    if config.eval_dataset:
        pair = load_datasets(held_out, plan, tokenizer, seed, device)
    if not config.dataset:
        return pair
    examples, count = stream_examples(config, plan, seed), int(config.val_size)
    if count:
        first = [row["example"] for row in examples.take(count)]
        split = tokenise_split(first, config, plan, tokenizer)
        pair = replace(pair, eval=as_dataset(split), stats={"eval": split.stats})
        examples = examples.skip(count)
    return replace(pair, train=tokenise_stream(examples, config, plan, tokenizer, seed))


def _run_first(work: Callable[[], None], device: torch.device | None, *, is_shared: bool) -> None:
    """Runs `work` on the first process of all, or of each node; the others wait for it."""
    if device is None:
        work()
        return
    from ulysses_monitor.common.ranks import agree_or_raise, rank

    is_first = rank() == 0 if is_shared else int(os.environ.get("LOCAL_RANK", rank())) == 0
    problem: Exception | None = None
    try:
        if is_first:
            work()
    except Exception as error:  # noqa: BLE001 - raised again, once no process waits
        problem = error
    agree_or_raise(problem, InputError("another process could not read the data"), device)


def _tokenise(
    config: DataConfig, plan: RowPlan, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Split]:
    train = list(read_examples(config.dataset, config, plan, seed).values())
    held_out = read_examples(config.eval_dataset, config, plan, seed)
    parts: dict[str, list[Any]] = {}
    if train:
        parts["train"] = mix(train, config, seed)
    if config.val_size:
        parts["train"], parts["eval"] = split_examples(parts["train"], config.val_size, seed)
    elif config.eval_on_each_dataset:
        parts |= {f"eval_{name}": examples for name, examples in held_out.items()}
    elif held_out:
        parts["eval"] = mix(list(held_out.values()), config, seed)
    return {
        name: tokenise_split(examples, config, plan, tokenizer)
        for name, examples in parts.items()
        if examples
    }


def tokenise_split(
    examples: list[Any], config: DataConfig, plan: RowPlan, tokenizer: PreTrainedTokenizerBase
) -> Split:
    """Tokenises examples a part at a time, or all at once if they are packed.

    Raises:
        InputError: An example has nothing to train on, and `bad_rows` is `refuse`; or none has.
    """
    if problem := plan.find_problem(examples):
        _refuse(problem, config)
        logger.warning("%s", problem)
    is_packed = (
        config.packing or config.neat_packing or (plan.name == "pt" and config.packing is None)
    )
    size = len(examples) if is_packed else config.preprocessing_batch_size
    tables, stats = [], None
    for start in range(0, len(examples), size):
        rows, counted = plan.tokenize(examples[start : start + size], tokenizer, config)
        stats = counted if stats is None else stats + counted
        if counted.dropped:
            _refuse(counted.first_dropped, config)
        if rows:
            tables.append(_as_table(rows))
    assert stats is not None  # noqa: S101 - there are examples
    if not tables:
        raise InputError(f"no row is left to train on; {stats.first_dropped}; raise cutoff_len")
    return Split(_join(tables), stats)


def _refuse(problem: str, config: DataConfig) -> None:
    """Raises `InputError` about examples if the config says so."""
    if config.bad_rows == "refuse":
        raise InputError(f"{problem}; change it, or set bad_rows: skip")


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    for index, field in enumerate(table.schema):
        if field.type == pa.list_(pa.int64()):  # token ids, which need half as much
            narrow = table.column(index).cast(pa.list_(pa.int32()))
            table = table.set_column(index, field.name, narrow)
    return table


def _join(tables: list[pa.Table]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(tables, promote_options="permissive")


def _check_description(folder: Path, described: dict[str, Any], config: DataConfig) -> None:
    """Refuses rows that were made with other settings or another tokenizer."""
    found = read_description(folder)
    if found.get("tokenizer") != described["tokenizer"]:
        raise InputError(f"tokenized_path {folder}: its rows have another tokenizer; {_HINT}")
    settings = found.get("settings", {})
    for key, value in described["settings"].items():
        is_left_open = not config.dataset and key in DATASET_KEYS
        if settings.get(key) != value and not is_left_open:
            raise InputError(
                f"tokenized_path {folder}: its rows have {key} {settings.get(key)!r}; {key} is "
                f"{value!r}, so {_HINT}"
            )


_HINT = "set tokenized_path to a new folder, or remove this one"


def _report(stats: dict[str, DataStats]) -> None:
    """Logs what was cut and left out."""
    if int(os.environ.get("RANK", "0")):
        return
    for name, of_split in stats.items():
        if of_split.cut_answers:
            logger.warning(
                "%s: %d of %d examples have an answer that is cut off at cutoff_len; the first: %s",
                name,
                of_split.cut_answers,
                of_split.examples,
                of_split.first_cut,
            )
        if of_split.dropped:
            logger.warning(
                "%s: left out %d of %d examples; the first: %s",
                name,
                of_split.dropped,
                of_split.examples,
                of_split.first_dropped,
            )

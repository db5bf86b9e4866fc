"""Several datasets in one run, saved datasets, and held-out rows of each dataset."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from ulysses_core.data import DataConfig, load_datasets
from ulysses_core.data.files import read_rows
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError


def rows(letter: str, count: int) -> list[dict[str, str]]:
    return [{"instruction": "q", "output": f"{letter}{index}"} for index in range(count)]


def answers(dataset: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row["input_ids"])[1:] for row in dataset]


@pytest.fixture
def folder(write_dataset: Callable[..., Path]) -> Path:
    write_dataset(rows("a", 6), name="a")
    return write_dataset(rows("b", 2), name="b")


@pytest.mark.parametrize(
    ("strategy", "counts"),
    [
        ("concat", {"a": 6, "b": 2}),
        ("interleave_under", {"a": 2, "b": 2}),
        ("interleave_over", {"a": 6, "b": 6}),
        ("interleave_once", {"a": 6, "b": 2}),
    ],
)
def test_datasets_are_mixed_by_the_strategy(
    folder: Path, tokenizer: PreTrainedTokenizerFast, strategy: str, counts: dict[str, int]
) -> None:
    config = DataConfig(dataset="a,b", dataset_dir=folder, template="empty", mix_strategy=strategy)
    found = answers(load_datasets(config, find_stage("sft"), tokenizer).train, tokenizer)
    mixed = Counter(answer[0] for answer in found)
    assert mixed == counts
    in_turn = [answer[0] for answer in found[:4]]
    assert in_turn == (["a"] * 4 if strategy == "concat" else ["a", "b", "a", "b"])


def test_interleave_probs_are_the_shares_of_the_datasets(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings: dict[str, Any] = {"dataset": "a,b", "dataset_dir": folder, "template": "empty"}
    settings |= {"mix_strategy": "interleave_over", "interleave_probs": "0.1, 0.9"}
    pair = load_datasets(DataConfig(**settings), find_stage("sft"), tokenizer)
    shares = Counter(answer[0] for answer in answers(pair.train, tokenizer))
    assert shares["b"] > 3 * shares["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interleave_probs": "0.5,0.5"}, "interleave_probs is set, but mix_strategy is concat"),
        (
            {"interleave_probs": "1.0", "mix_strategy": "interleave_over"},
            "interleave_probs has 1 numbers; expected 2, one for each of dataset",
        ),
        (
            {"interleave_probs": [0.5, 0.6], "mix_strategy": "interleave_over"},
            "the sum of interleave_probs is 1.1; expected 1",
        ),
        ({"streaming": True, "max_samples": 3}, "streaming and max_samples are both set"),
        ({"streaming": True, "val_size": 0.1}, "expected a number of examples"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(dataset="a,b", **settings)


def test_each_eval_dataset_is_kept_apart(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(
        dataset="a", eval_dataset="b,a", eval_on_each_dataset=True, dataset_dir=folder
    )
    pair = load_datasets(config, find_stage("sft"), tokenizer)
    assert isinstance(pair.eval, dict)
    assert {name: len(part) for name, part in pair.eval.items()} == {"b": 2, "a": 6}
    assert set(pair.stats) == {"train", "eval_b", "eval_a"}


def test_saved_datasets_are_read_by_path(
    tmp_path: Path, write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    train, test = (datasets.Dataset.from_list(rows(letter, 3)) for letter in "ab")
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    (tmp_path / "csv").mkdir()
    train.to_csv(tmp_path / "csv" / "part.csv")
    train.to_parquet(tmp_path / "rows.parquet")
    folder = write_dataset([], name="one", file_name="one.txt", raw="unused")
    entries = {
        "saved": {"file_name": "one"},
        "split": {"file_name": "two", "split": "test"},
        "csv": {"file_name": "csv"},
        "parquet": {"file_name": "rows.parquet"},
        "hub": {"hf_hub_url": str(tmp_path / "csv")},
        "missing": {"file_name": "two", "split": "dev"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))

    def load(name: str) -> list[str]:
        config = DataConfig(dataset=name, dataset_dir=folder, template="empty")
        return answers(load_datasets(config, find_stage("sft"), tokenizer).train, tokenizer)

    for name in ("saved", "csv", "parquet", "hub"):
        assert load(name) == ["a0", "a1", "a2"], name
    assert load("split") == ["b0", "b1", "b2"]
    with pytest.raises(InputError, match="split is 'dev'; allowed: train, test"):
        load("missing")


@pytest.mark.parametrize("opener", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_are_read(tmp_path: Path, opener: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows("a", 3))
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, opener(sink, table.schema) as writer:
        writer.write_table(table)
    assert [row.values for row in read_rows(tmp_path / "t.arrow")] == rows("a", 3)
    (tmp_path / "t.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(InputError, match=r"t.arrow: not valid Arrow"):
        read_rows(tmp_path / "t.arrow")

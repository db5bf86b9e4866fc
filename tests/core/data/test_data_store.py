"""Rows are read and tokenised once: for all processes, and for later runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from tests.core.data.conftest import build_tokenizer
from tests.support.spawn import spawn
from ulysses_core.data import DataConfig, load_datasets
from ulysses_core.data.stats import DataStats
from ulysses_core.data.store import Split, open_rows, write_rows
from ulysses_core.trainers.stage import Stage, find_stage
from ulysses_monitor.common.errors import InputError

ROWS = [{"instruction": "q", "output": f"{n:03d}"} for n in range(30)]


class Counted:
    """Stage `sft`, and how often it tokenised."""

    def __init__(self) -> None:
        self.calls = 0
        sft = find_stage("sft")

        def tokenize(*arguments: Any) -> Any:
            self.calls += 1
            return sft.tokenize(*arguments)

        self.stage: Stage = replace(sft, tokenize=tokenize)


@pytest.fixture
def config(
    write_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DataConfig:
    monkeypatch.setenv("ULYSSES_CACHE_DIR", str(tmp_path / "cache"))
    return DataConfig(dataset="toy", dataset_dir=write_dataset(ROWS), template="empty")


def changed(config: DataConfig, **changes: Any) -> DataConfig:
    return DataConfig(**config.model_dump() | changes)


def test_a_second_run_finds_the_rows_of_the_first(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    plan = Counted()
    first = load_datasets(config, plan.stage, tokenizer)
    second = load_datasets(config, plan.stage, tokenizer)
    assert plan.calls == 1
    assert list(first.train) == list(second.train)
    assert first.stats == second.stats
    load_datasets(changed(config, overwrite_cache=True), plan.stage, tokenizer)
    assert plan.calls == 2


def test_what_changes_a_row_is_tokenised_again(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    plan = Counted()
    load_datasets(config, plan.stage, tokenizer)
    load_datasets(changed(config, cutoff_len=9), plan.stage, tokenizer)
    load_datasets(config, plan.stage, tokenizer, seed=1)
    file = config.dataset_dir / "toy.json"
    os.utime(file, ns=(0, 0))
    load_datasets(config, plan.stage, tokenizer)
    file.write_text(json.dumps(ROWS[:5]))
    assert len(load_datasets(config, plan.stage, tokenizer).train) == 5
    tokenizer.add_tokens(["q0"])
    load_datasets(config, plan.stage, tokenizer)
    assert plan.calls == 6


def test_rows_are_tokenised_a_part_at_a_time(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    plan = Counted()
    parts = load_datasets(changed(config, preprocessing_batch_size=7), plan.stage, tokenizer)
    assert plan.calls == 5
    whole = load_datasets(changed(config, overwrite_cache=True), plan.stage, tokenizer)
    assert list(parts.train) == list(whole.train)
    assert parts.stats == whole.stats


def test_tokenized_path_is_written_once_and_needs_no_dataset_later(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plan = Counted()
    kept = changed(config, tokenized_path=tmp_path / "rows", val_size=3)
    first = load_datasets(kept, plan.stage, tokenizer)
    (config.dataset_dir / "toy.json").unlink()
    later = DataConfig(template="empty", tokenized_path=tmp_path / "rows")
    second = load_datasets(later, plan.stage, tokenizer)
    assert plan.calls == 2  # train and eval
    assert list(first.train) == list(second.train)
    assert list(first.eval) == list(second.eval)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cutoff_len": 9},
            "its rows have cutoff_len 2048; cutoff_len is 9, so set tokenized_path",
        ),
        ({"template": "qwen"}, "its rows have template 'empty'; template is 'qwen'"),
        ({"mask_history": True}, "its rows have mask_history False; mask_history is True"),
        ({"val_size": 2}, "its rows have val_size 0.0; val_size is 2.0"),
    ],
)
def test_tokenized_rows_of_other_settings_are_refused_by_name(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    kept = changed(config, tokenized_path=tmp_path / "rows")
    load_datasets(kept, find_stage("sft"), tokenizer)
    with pytest.raises(InputError, match=message):
        load_datasets(changed(kept, **changes), find_stage("sft"), tokenizer)


def test_tokenized_rows_of_another_stage_or_tokenizer_are_refused(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    load_datasets(changed(config, tokenized_path=tmp_path / "rows"), find_stage("sft"), tokenizer)
    later = DataConfig(template="empty", tokenized_path=tmp_path / "rows")
    with pytest.raises(InputError, match="its rows have stage 'sft'; stage is 'dpo'"):
        load_datasets(later, find_stage("dpo"), tokenizer)
    tokenizer.add_tokens(["word"])
    with pytest.raises(InputError, match="its rows have another tokenizer"):
        load_datasets(later, find_stage("sft"), tokenizer)


def test_a_folder_with_other_files_is_never_replaced(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="it holds other files; set tokenized_path to another"):
        load_datasets(
            changed(config, tokenized_path=tmp_path / "notes"), find_stage("sft"), tokenizer
        )
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"
    assert not list(tmp_path.glob("notes.*"))


def test_damaged_rows_are_named(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    kept = changed(config, tokenized_path=tmp_path / "rows")
    load_datasets(kept, find_stage("sft"), tokenizer)
    [file] = (tmp_path / "rows").glob("*.arrow")
    file.write_bytes(b"no")
    with pytest.raises(InputError, match=rf"{file.name}: cannot read the tokenised rows"):
        load_datasets(kept, find_stage("sft"), tokenizer)
    (tmp_path / "rows" / "rows.json").write_text("[]")
    with pytest.raises(InputError, match=r"rows.json: it does not describe tokenised rows"):
        load_datasets(kept, find_stage("sft"), tokenizer)


def load_on_a_rank(folder: str, names: list[str]) -> list[dict[str, Any]]:
    """The child: how often this rank tokenised, and what it got, for each dataset."""
    results = []
    for name in names:
        plan = Counted()
        config = DataConfig(dataset=name, dataset_dir=Path(folder), template="empty")
        try:
            pair = load_datasets(config, plan.stage, build_tokenizer(), device=torch.device("cpu"))
            results.append({"calls": plan.calls, "rows": len(pair.train), "error": ""})
        except InputError as error:
            results.append({"calls": plan.calls, "rows": 0, "error": str(error)})
    return results


def test_one_rank_tokenises_and_a_wrong_row_stops_all(
    write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    write_dataset(ROWS)
    folder = write_dataset([*ROWS, {"instruction": "q"}], name="broken")
    env = {"ULYSSES_CACHE_DIR": str(tmp_path / "cache")}
    args = [str(folder), ["toy", "broken"]]
    first, second = spawn(load_on_a_rank, 2, args=args, env=env)
    assert first[0] == {"calls": 1, "rows": 30, "error": ""}
    assert second[0] == {"calls": 0, "rows": 30, "error": ""}
    assert "broken.json, row 31: column 'output' (response) is missing" in first[1]["error"]
    assert second[1]["error"] == "another process could not read the data"


def counted(examples: int) -> DataStats:
    return DataStats(
        examples=examples, dropped=0, truncated=0, rows=50, tokens=50, trained_tokens=50
    )


def write_and_read(folder: str, rounds: int) -> list[list[int]]:
    """The child: writes rows of its own over those of others; returns what it read meanwhile."""
    rank, path, seen = dist.get_rank(), Path(folder), []
    for number in range(rounds):
        mark = 2 * number + rank
        rows = pa.table({"mark": [mark] * 50})
        splits = {name: Split(rows, counted(mark)) for name in ("train", "eval")}
        write_rows(path, splits, {})
        pair = open_rows(path)
        assert pair.train is not None
        marks = {*pair.train["mark"], *pair.eval["mark"]}
        seen.append(sorted(marks | {stats.examples for stats in pair.stats.values()}))
    return seen


def test_two_processes_write_one_folder_and_readers_see_the_rows_of_one(tmp_path: Path) -> None:
    for seen in spawn(write_and_read, 2, args=[str(tmp_path / "rows"), 40]):
        assert all(len(marks) == 1 for marks in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    left = sorted(path.suffix for path in (tmp_path / "rows").iterdir())
    assert left == [".arrow", ".arrow", ".json"]  # the later rows, and no others


def test_a_reader_keeps_the_rows_that_it_opened(tmp_path: Path) -> None:
    def write(mark: int) -> None:
        table = pa.table({"mark": [mark] * 5})
        write_rows(tmp_path / "rows", {"train": Split(table, counted(5))}, {})

    write(1)
    first = open_rows(tmp_path / "rows").train
    write(2)
    assert list(first["mark"]) == [1] * 5
    assert list(open_rows(tmp_path / "rows").train["mark"]) == [2] * 5

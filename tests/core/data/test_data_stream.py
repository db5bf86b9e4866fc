"""Streams: rows are read while the training runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ulysses_core.data import DataConfig, load_datasets
from ulysses_core.data.files import Row
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError

ROWS = [{"instruction": "q", "output": f"{n:04d}"} for n in range(2000)]


def answers(rows: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row["input_ids"])[1:] for row in rows]


def stream(folder: Path, **settings: Any) -> DataConfig:
    settings = {"dataset": "toy", "template": "empty", "buffer_size": 50} | settings
    return DataConfig(dataset_dir=folder, streaming=True, preprocessing_batch_size=10, **settings)


@pytest.fixture
def folder(write_dataset: Callable[..., Path]) -> Path:
    return write_dataset(ROWS)


def test_a_stream_reads_a_part_of_its_file_and_no_more(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    stage = find_stage("sft")
    convert = stage.convert

    def count(row: Row, spec: Any) -> Any:
        read.append(row.number)
        return convert(row, spec)

    pair = load_datasets(stream(folder), replace(stage, convert=count), tokenizer)
    assert read == []
    assert len(list(islice(pair.train, 100))) == 100
    assert 100 <= len(read) < 200


def test_every_row_comes_once_an_epoch_in_another_order(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = load_datasets(stream(folder), find_stage("sft"), tokenizer).train
    epochs = []
    for epoch in range(2):
        rows.set_epoch(epoch)
        epochs.append(answers(rows, tokenizer))
    assert sorted(epochs[0]) == sorted(epochs[1]) == [row["output"] for row in ROWS]
    assert epochs[0] != epochs[1]


def test_the_first_examples_of_a_stream_are_held_out(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = load_datasets(stream(folder, val_size=5), find_stage("sft"), tokenizer)
    assert answers(pair.eval, tokenizer) == [f"{n:04d}" for n in range(5)]
    assert sorted(answers(pair.train, tokenizer)) == [f"{n:04d}" for n in range(5, 2000)]


@pytest.mark.parametrize(
    ("strategy", "shares", "counts"),
    [
        ("concat", None, (40, 20)),
        ("interleave_under", None, (21, 20)),
        ("interleave_over", None, (40, 40)),
        ("interleave_once", None, (40, 20)),
        ("interleave_over", [0.1, 0.9], None),
    ],
)
def test_streams_are_mixed(
    write_dataset: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    strategy: str,
    shares: list[float] | None,
    counts: tuple[int, int] | None,
) -> None:
    write_dataset([{"instruction": "q", "output": f"a{n}"} for n in range(40)], name="a")
    folder = write_dataset([{"instruction": "q", "output": f"b{n}"} for n in range(20)], name="b")
    mix = {"mix_strategy": strategy, "interleave_probs": shares}
    config = stream(folder, dataset="a,b", buffer_size=1, **mix)
    rows = load_datasets(config, find_stage("sft"), tokenizer).train
    assert rows.n_shards == 1  # with one for each dataset accelerate would split them over ranks
    found = [answer[0] for answer in answers(rows, tokenizer)]
    if counts is None:
        assert found.count("b") > 3 * found.count("a") >= 120
    else:
        assert (found.count("a"), found.count("b")) == counts
        assert found[:4] == (["a"] * 4 if strategy == "concat" else ["a", "b", "a", "b"])


def test_a_wrong_row_stops_a_stream_or_is_counted(
    write_dataset: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_dataset([*ROWS[:20], {"instruction": "q"}, *ROWS[20:40]])
    rows = load_datasets(stream(folder), find_stage("sft"), tokenizer).train
    with pytest.raises(InputError, match="row 21: column 'output'"):
        list(rows)
    rows = load_datasets(stream(folder, bad_rows="skip"), find_stage("sft"), tokenizer).train
    with caplog.at_level(logging.WARNING, logger="ulysses_core"):
        assert len(list(rows)) == 40
    assert "left out 1 rows; the first: " in caplog.text
    assert "row 21" in caplog.text


def test_a_row_without_a_label_stops_a_stream(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_dataset([*ROWS[:20], {"instruction": "q" * 500, "output": "1" * 500}])
    config = stream(folder, template="qwen", cutoff_len=20, mask_history=True)
    assert len(list(load_datasets(config, find_stage("sft"), tokenizer).train)) == 21
    config = stream(folder, cutoff_len=1)
    with pytest.raises(InputError, match="no token of an answer is within cutoff_len 1"):
        list(load_datasets(config, find_stage("sft"), tokenizer).train)
    config = stream(folder, cutoff_len=1, bad_rows="skip")
    assert list(load_datasets(config, find_stage("sft"), tokenizer).train) == []


def test_rows_of_a_stream_are_packed(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = stream(folder, packing=True, cutoff_len=15)
    rows = list(load_datasets(config, find_stage("sft"), tokenizer).train)
    assert len(rows) < 1000
    assert rows[0]["position_ids"].count(0) == 3


def test_tokenised_rows_are_streamed(
    folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    kept = {"tokenized_path": tmp_path / "rows"}
    with pytest.raises(InputError, match="is not written yet, which streaming does not do"):
        load_datasets(stream(folder, **kept), find_stage("sft"), tokenizer)
    whole = DataConfig(dataset="toy", dataset_dir=folder, template="empty", **kept)
    load_datasets(whole, find_stage("sft"), tokenizer)
    rows = load_datasets(stream(folder, **kept), find_stage("sft"), tokenizer).train
    assert sorted(answers(rows, tokenizer)) == [row["output"] for row in ROWS]


def test_num_samples_is_refused_for_a_stream(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_dataset(ROWS, num_samples=3)
    with pytest.raises(InputError, match="num_samples is 3, which streaming does not allow"):
        load_datasets(stream(folder), find_stage("sft"), tokenizer)


def test_the_first_cut_answer_of_a_stream_is_named(
    write_dataset: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_dataset([*ROWS[:20], *[{"instruction": "q", "output": "1" * 500}] * 20])
    config = stream(folder, cutoff_len=20, buffer_size=1)
    rows = load_datasets(config, find_stage("sft"), tokenizer).train
    with caplog.at_level(logging.WARNING, logger="ulysses_core"):
        assert len(list(rows)) == 40
    [record] = caplog.records
    assert "an answer is cut off at cutoff_len; the first: " in record.message
    assert record.message.endswith("row 21")


TAGGED = [{"instruction": "q", "output": f"{n:04d}", "tag": True} for n in range(30)]


@pytest.fixture
def tagged(write_dataset: Callable[..., Path]) -> Callable[[list[dict[str, Any]]], Path]:
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "tag"}
    return lambda rows: write_dataset(rows, columns=columns)


def test_a_stream_whose_answers_all_have_one_tag_is_refused_at_its_end(
    tagged: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    kto = find_stage("kto")
    rows = load_datasets(stream(tagged(TAGGED)), kto, tokenizer).train
    with pytest.raises(InputError, match=r"true in all 30 examples; .* bad_rows: skip"):
        next(iter(rows))  # the buffer is larger than the stream
    mixed = [*TAGGED[:-1], TAGGED[-1] | {"tag": False}]
    assert len(list(load_datasets(stream(tagged(mixed)), kto, tokenizer).train)) == 30
    # The one of the other kind is held out, so all others are of one.
    mixed = [TAGGED[0] | {"tag": False}, *TAGGED[1:]]
    config = stream(tagged(mixed), val_size=1, bad_rows="skip")
    assert len(list(load_datasets(config, kto, tokenizer).train)) == 29


def test_it_is_told_as_soon_as_the_buffer_is_full_and_at_the_end(
    tagged: Any, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    config = stream(tagged(TAGGED), buffer_size=20, bad_rows="skip")
    rows = iter(load_datasets(config, find_stage("kto"), tokenizer).train)
    with caplog.at_level(logging.WARNING, logger="ulysses_core"):
        next(rows)
        assert "so far, kto_tag is true in all 20 examples" in caplog.text
        assert len(list(rows)) == 29
    assert caplog.messages[-1].startswith("kto_tag is true in all 30 examples; expected desirable")

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ulysses_core.data import DataConfig, check_sources, load_datasets
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError

REAL = Path(__file__).parents[4] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the demo data is not here")


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": "q", "output": f"{start + index:03d}"} for index in range(count)]


def answers(dataset: object, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row["input_ids"])[1:] for row in dataset]  # type: ignore[attr-defined]


def test_datasets_are_truncated_to_max_samples_and_joined(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    write_dataset(rows(3), name="a")
    folder = write_dataset(rows(3, start=10), name="b")
    config = DataConfig(dataset="a,b", dataset_dir=folder, template="empty", max_samples=2)
    pair = load_datasets(config, find_stage("sft"), tokenizer)
    assert answers(pair.train, tokenizer) == ["000", "001", "010", "011"]
    assert pair.eval is None
    assert set(pair.stats) == {"train"}


def test_num_samples_uses_every_row_before_it_repeats_any(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_dataset(rows(4), num_samples=6)
    config = DataConfig(dataset="toy", dataset_dir=folder, template="empty")
    drawn = answers(load_datasets(config, find_stage("sft"), tokenizer, seed=1).train, tokenizer)
    assert len(drawn) == 6
    assert set(drawn[:4]) == {"000", "001", "002", "003"}
    assert drawn == answers(
        load_datasets(config, find_stage("sft"), tokenizer, seed=1).train, tokenizer
    )


@pytest.mark.parametrize(("val_size", "held_out"), [(3, 3), (0.25, 5)])
def test_val_size_splits_by_seed(
    write_dataset: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    val_size: float,
    held_out: int,
) -> None:
    folder = write_dataset(rows(20))
    config = DataConfig(dataset="toy", dataset_dir=folder, template="empty", val_size=val_size)
    splits = []
    for seed in (0, 0, 1):
        pair = load_datasets(config, find_stage("sft"), tokenizer, seed)
        train, evaluated = answers(pair.train, tokenizer), answers(pair.eval, tokenizer)
        assert len(evaluated) == held_out
        assert sorted(train + evaluated) == [f"{index:03d}" for index in range(20)]
        splits.append(evaluated)
    assert splits[0] == splits[1] != splits[2]


def test_a_val_size_that_leaves_nothing_to_train_on_is_refused(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = DataConfig(dataset="toy", dataset_dir=write_dataset(rows(3)), val_size=3)
    with pytest.raises(InputError, match=r"val_size is 3, .* no examples to train on; .* has 3"):
        load_datasets(config, find_stage("sft"), tokenizer)


def test_eval_dataset_is_read_with_or_without_dataset(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    write_dataset(rows(3), name="a")
    folder = write_dataset(rows(1), name="b")
    config = DataConfig(dataset="a", eval_dataset="b", dataset_dir=folder)
    pair = load_datasets(config, find_stage("sft"), tokenizer)
    assert (len(pair.train), len(pair.eval)) == (3, 1)
    alone = load_datasets(
        DataConfig(eval_dataset="b", dataset_dir=folder), find_stage("sft"), tokenizer
    )
    assert alone.train is None
    with pytest.raises(InputError, match="dataset is not set"):
        load_datasets(DataConfig(), find_stage("sft"), tokenizer)


def test_packed_rows_have_position_ids(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_dataset(rows(4))
    config = DataConfig(
        dataset="toy", dataset_dir=folder, template="empty", neat_packing=True, cutoff_len=8
    )
    pair = load_datasets(config, find_stage("sft"), tokenizer)
    assert pair.train.column_names == ["input_ids", "labels", "position_ids"]
    assert pair.train[0]["position_ids"] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_pt_reads_text_files(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_dataset(None, file_name="toy.txt", raw="12\n34\n")
    config = DataConfig(dataset="toy", dataset_dir=folder, cutoff_len=3)
    pair = load_datasets(config, find_stage("pt"), tokenizer)
    assert [tokenizer.decode(ids) for ids in pair.train["input_ids"]] == ["12</s>", "34</s>"]


@needs_real_data
def test_real_instruction_data_is_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(
        dataset="identity,alpaca_en_demo",
        dataset_dir=REAL,
        template="qwen3",
        max_samples=100,
        cutoff_len=512,
        packing=True,
    )
    check_sources(config, find_stage("sft"))
    pair = load_datasets(config, find_stage("sft"), tokenizer)
    stats = pair.stats["train"]
    assert (stats.examples, stats.dropped) == (191, 0)
    assert stats.rows < stats.examples
    assert 0 < stats.trained_tokens < stats.tokens
    assert max(len(ids) for ids in pair.train["input_ids"]) <= 512


@needs_real_data
def test_real_preference_data_is_refused_for_sft() -> None:
    with pytest.raises(InputError, match="'dpo_en_demo' is a preference dataset"):
        check_sources(DataConfig(dataset="dpo_en_demo", dataset_dir=REAL), find_stage("sft"))

"""Preference rows: reading, tokenising, and what is refused or left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ulysses_core.data import DataConfig, check_sources, load_datasets
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError

PAIR = {"instruction": "q", "input": "more", "chosen": "good answer", "rejected": "bad"}
PAIRS = {
    "ranking": True,
    "columns": {
        "prompt": "instruction",
        "query": "input",
        "chosen": "chosen",
        "rejected": "rejected",
    },
}
TAGGED = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"}}
CHAT = {
    "conversations": [
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "three"},
    ],
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "bad"},
}
CHATS = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}

Write = Callable[..., Path]


def load(folder: Path, stage: str, tokenizer: Any, **settings: Any) -> list[dict[str, Any]]:
    settings = {"dataset": "toy", "dataset_dir": folder, "template": "default"} | settings
    pair = load_datasets(DataConfig(**settings), find_stage(stage), tokenizer)
    assert pair.train is not None
    return list(pair.train)


def test_a_pair_keeps_prompt_and_answers_apart(write_dataset: Write, tokenizer: Any) -> None:
    (row,) = load(write_dataset([PAIR], **PAIRS), "dpo", tokenizer)
    prompt, chosen, rejected = (
        tokenizer.decode(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    assert "q\nmore" in prompt
    assert chosen == "good answer</s>\n"
    assert rejected == "bad</s>\n"


def test_a_reward_model_reads_whole_rows(write_dataset: Write, tokenizer: Any) -> None:
    folder = write_dataset([PAIR], **PAIRS)
    (pair,), (row,) = (load(folder, stage, tokenizer) for stage in ("dpo", "rm"))
    assert row == {
        "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
        "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
    }


def test_the_prompt_of_a_chat_has_its_earlier_turns(write_dataset: Write, tokenizer: Any) -> None:
    (row,) = load(write_dataset([CHAT], **CHATS), "dpo", tokenizer)
    prompt = tokenizer.decode(row["prompt_ids"])
    assert [word in prompt for word in ("one", "two", "three", "good")] == [True] * 3 + [False]
    assert tokenizer.decode(row["chosen_ids"]).startswith("good")


def test_both_sides_are_cut_alike(write_dataset: Write, tokenizer: Any) -> None:
    long = PAIR | {"instruction": "q " * 40, "chosen": "a " * 60, "rejected": "b " * 20}
    (row,) = load(write_dataset([long], **PAIRS), "dpo", tokenizer, cutoff_len=40)
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 40
    assert len(row["rejected_ids"]) <= len(row["chosen_ids"])


def test_pairs_that_differ_only_beyond_the_cut_are_dropped(
    write_dataset: Write, tokenizer: Any
) -> None:
    same = PAIR | {"chosen": "a " * 60 + "x", "rejected": "a " * 60 + "y"}
    folder = write_dataset([same, PAIR], **PAIRS)
    assert len(load(folder, "dpo", tokenizer, cutoff_len=30, bad_rows="skip")) == 1
    with pytest.raises(InputError, match="row 1: the answers do not differ within cutoff_len 30"):
        load(folder, "dpo", tokenizer, cutoff_len=30)
    folder = write_dataset([same], **PAIRS)
    with pytest.raises(InputError, match=r"no row is left to train on; .*row 1.*; raise cutoff"):
        load(folder, "dpo", tokenizer, cutoff_len=30, bad_rows="skip")


def test_tagged_answers_keep_their_label(write_dataset: Write, tokenizer: Any) -> None:
    rows = [{"instruction": "q", "output": "a", "tag": tag} for tag in (True, False)]
    found = load(write_dataset(rows, **TAGGED), "kto", tokenizer)
    assert [row["label"] for row in found] == [True, False]
    assert tokenizer.decode(found[0]["completion_ids"]) == "a</s>\n"


@pytest.mark.parametrize(
    ("stage", "rows", "entry", "message"),
    [
        ("dpo", [{"instruction": "q", "input": ""}], PAIRS, "columns.chosen is 'chosen'"),
        (
            "dpo",
            [PAIR, {"instruction": "q", "input": "", "chosen": "a"}],
            PAIRS,
            "row 2: column 'rejected' (rejected) is missing",
        ),
        ("rm", [PAIR | {"chosen": " "}], PAIRS, "row 1: column 'chosen' (chosen) is empty"),
        ("dpo", [PAIR | {"rejected": "good answer"}], PAIRS, "rejected answer are equal"),
        ("dpo", [PAIR | {"rejected": 3}], PAIRS, "(rejected) is a number; expected a string"),
        ("dpo", [CHAT | {"chosen": "text"}], CHATS, "chosen is a string; expected an object"),
        (
            "dpo",
            [CHAT | {"chosen": {"from": "human", "value": "x"}}],
            CHATS,
            "the role of chosen is 'user'; expected assistant or function",
        ),
        (
            "dpo",
            [CHAT | {"conversations": CHAT["conversations"][:2]}],
            CHATS,
            "ends with a assistant turn; expected it to end with user or observation",
        ),
        ("sft", [PAIR], PAIRS, "preference dataset (ranking: true), for stages dpo and rm"),
        ("kto", [PAIR], PAIRS, "stage is kto, so choose another dataset"),
        ("dpo", [{"instruction": "q", "output": "a"}], {}, "without preferences, for stages sft"),
        (
            "kto",
            [{"instruction": "q", "output": "a", "tag": "yes"}],
            TAGGED,
            "(kto_tag) is a string; expected true or false",
        ),
        (
            "kto",
            [{"instruction": "q", "output": "", "tag": True}],
            TAGGED,
            "row 1: the last answer is empty",
        ),
    ],
)
def test_the_error_about_a_preference_row_names_it(
    write_dataset: Write, stage: str, rows: Any, entry: dict[str, Any], message: str
) -> None:
    config = DataConfig(dataset="toy", dataset_dir=write_dataset(rows, **entry))
    with pytest.raises(InputError) as caught:
        check_sources(config, find_stage(stage))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tags_of_one_kind_are_refused(
    write_dataset: Write, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_dataset([{"instruction": "q", "output": "a", "tag": True}] * 3, **TAGGED)
    with pytest.raises(InputError, match="kto_tag is true in all 3 examples"):
        load(folder, "kto", tokenizer)
    with caplog.at_level(logging.WARNING, logger="ulysses_core"):
        assert len(load(folder, "kto", tokenizer, bad_rows="skip")) == 3
    assert "kto_tag is true in all 3 examples" in caplog.text


def test_bad_rows_are_left_out_and_counted_if_the_config_says_so(
    write_dataset: Write, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_dataset([PAIR | {"chosen": ""}, PAIR, PAIR | {"rejected": ""}], **PAIRS)
    with caplog.at_level(logging.WARNING, logger="ulysses_core"):
        assert len(load(folder, "dpo", tokenizer, bad_rows="skip")) == 1
    (record,) = caplog.records
    assert "left out 2 of 3 rows; the first: " in record.message
    assert "row 1: column 'chosen' (chosen) is empty" in record.message
    (folder / "toy.json").write_text(json.dumps([PAIR | {"chosen": ""}]))
    with pytest.raises(InputError, match=r"no row is left to train on; .*row 1"):
        load(folder, "dpo", tokenizer, bad_rows="skip")

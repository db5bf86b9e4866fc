"""Prompts to sample answers to, with and without reference answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ulysses_core.data import DataConfig
from ulysses_core.data.files import Row
from ulysses_core.data.prompts import to_prompt, tokenize_prompts
from ulysses_core.data.registry import Columns, DatasetSpec, Tags
from ulysses_monitor.common.errors import InputError

ALPACA = DatasetSpec(
    name="sums",
    path=Path("sums.json"),
    split="train",
    formatting="alpaca",
    ranking=False,
    num_samples=None,
    columns=Columns(prompt="instruction", query="input", response="output"),
    has_columns=False,
    tags=Tags(),
)
SHAREGPT = replace(ALPACA, formatting="sharegpt", columns=Columns(messages="conversations"))
HUMAN, GPT = {"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": " 2 "}
MORE = {"from": "human", "value": "and 2 + 2"}


def row(**values: Any) -> Row:
    return Row(values, Path("sums.json"), 3)


@pytest.mark.parametrize(
    ("spec", "given", "question", "answer"),
    [
        (ALPACA, row(instruction="1 + 1", output="2"), "1 + 1", "2"),
        (ALPACA, row(instruction="1 + 1"), "1 + 1", None),
        (ALPACA, row(instruction="1 + 1", output=None), "1 + 1", None),
        (
            replace(ALPACA, columns=Columns(prompt="instruction")),
            row(instruction="1 + 1"),
            "1 + 1",
            None,
        ),
        (SHAREGPT, row(conversations=[HUMAN, GPT]), "1 + 1", "2"),
        (SHAREGPT, row(conversations=[HUMAN]), "1 + 1", None),
        (SHAREGPT, row(conversations=[HUMAN, GPT, MORE]), "and 2 + 2", None),
    ],
)
def test_the_last_answer_is_the_reference(
    spec: DatasetSpec, given: Row, question: str, answer: str | None
) -> None:
    prompt = to_prompt(given, spec)
    assert (prompt.question, prompt.answer) == (question, answer)


def test_a_prompt_is_tokenised_up_to_the_answer(tokenizer: Any) -> None:
    conversation = [HUMAN, GPT, MORE]
    [found], stats = tokenize_prompts(
        [to_prompt(row(conversations=conversation), SHAREGPT)],
        tokenizer,
        DataConfig(template="chatml"),
    )
    assert tokenizer.decode(found["prompt"]) == (
        "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n 2 <|im_end|>\n"
        "<|im_start|>user\nand 2 + 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found["where"] == "sums.json, row 3"
    assert (stats.rows, stats.tokens) == (1, len(found["prompt"]))


def test_a_prompt_beyond_cutoff_len_gives_no_row(tokenizer: Any) -> None:
    prompts = [to_prompt(row(instruction=text), ALPACA) for text in ("1", "1 + 1 " * 40)]
    rows, stats = tokenize_prompts(
        prompts, tokenizer, DataConfig(template="default", cutoff_len=64)
    )
    assert (len(rows), stats.dropped) == (1, 1)
    assert "sums.json, row 3: the prompt has " in stats.first_dropped


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="row 3: the prompt is empty"):
        to_prompt(row(instruction=" ", output="2"), ALPACA)

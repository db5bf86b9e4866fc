"""The rows at which an initialisation looks, in the columns of each stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from ulysses_core.config import FinetuningConfig
from ulysses_core.trainers.init_rows import read_init_rows

IDS = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "position_ids": [0, 1, 0]}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": (IDS, IDS),
    "dpo": (
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
    ),
    "rm": (
        {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 5]},
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
    ),
    "kto": (
        {"prompt_ids": [1, 2], "completion_ids": [3], "label": False},
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
    ),
    "grpo": (
        {"prompt": [1, 2], "question": "q", "answer": None, "where": "f"},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ),
}


def config_of(**keys: Any) -> Any:
    return SimpleNamespace(finetuning=FinetuningConfig(**keys))


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("stage", ROWS)
def test_the_first_rows_of_a_stage_become_tokens_and_labels(stage: str, is_stream: bool) -> None:
    row, expected = ROWS[stage]
    data: Any = datasets.Dataset.from_list([row] * 5)
    data = data.to_iterable_dataset() if is_stream else data
    config = config_of(stage=stage, lora_init="eva", lora_init_rows=3)
    assert read_init_rows(config, data) == [expected] * 3


@pytest.mark.parametrize(
    "keys", [{"lora_init": "pissa"}, {"finetuning_type": "full"}, {"finetuning_type": "oft"}]
)
def test_without_such_an_initialisation_no_row_is_read(keys: dict[str, Any]) -> None:
    assert read_init_rows(config_of(**keys), None) == []

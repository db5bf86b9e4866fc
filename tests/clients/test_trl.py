"""TRL's command line: `trl sft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.clients.case import Case, Client
from tests.clients.conftest import Check
from tests.clients.rows import rows

NEWEST = Client(
    "trl",
    packages=("trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2"),
)


def ask(row_question: str) -> list[dict[str, str]]:
    """Returns the user's turn."""
    return [{"role": "user", "content": row_question}]


def answer(text: str) -> list[dict[str, str]]:
    """Returns the assistant's turn."""
    return [{"role": "assistant", "content": text}]


DATA: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "sft": [{"messages": ask(row.question) + answer(row.chosen)} for row in rows()],
}
SETTINGS = {
    "model_name_or_path": "../llama",
    "dtype": "float32",
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.1,
    "logging_steps": 1,
    "use_cpu": "true",
    "bf16": "false",
    "seed": 3,
    "report_to": "none",
}
LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}


def make_case(client: Client, variant: str, command: str, **settings: object) -> Case:
    """Returns a case of `trl COMMAND` with `settings`."""
    given = {**SETTINGS, "dataset_name": "data", **settings}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return Case(
        client,
        variant,
        command=("trl", command, *options),
        files={"data/train.jsonl": DATA[command]},
    )


CASES = [
    make_case(NEWEST, "sft, full", "sft"),
    make_case(NEWEST, "sft, LoRA", "sft", **LORA),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_with_trl_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

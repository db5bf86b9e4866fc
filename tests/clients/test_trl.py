"""TRL's command line, `trl sft` and its like, in the newest and in the oldest declared version."""

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
OLDEST = Client(
    "trl",
    packages=("trl==0.24.0", "transformers==4.57.6", "accelerate==1.11.0", "peft==0.18.1"),
    folder="trl-oldest",
)


def ask(row_question: str) -> list[dict[str, str]]:
    """Returns the user's turn."""
    return [{"role": "user", "content": row_question}]


def answer(text: str) -> list[dict[str, str]]:
    """Returns the assistant's turn."""
    return [{"role": "assistant", "content": text}]


DATA: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "sft": [{"messages": ask(row.question) + answer(row.chosen)} for row in rows()],
    "dpo": [
        {
            "prompt": ask(row.question),
            "chosen": answer(row.chosen),
            "rejected": answer(row.rejected),
        }
        for row in rows()
    ],
    "reward": [
        {
            "chosen": ask(row.question) + answer(row.chosen),
            "rejected": ask(row.question) + answer(row.rejected),
        }
        for row in rows()
    ],
    "kto": [
        {"prompt": ask(row.question), "completion": answer(text), "label": label}
        for row in rows(24)
        for text, label in ((row.chosen, True), (row.rejected, False))
    ],
    "grpo": [{"prompt": ask(row.question)} for row in rows()],
}
REWARDS = '''
def count_letters(completions, **kwargs):
    """Rewards answers with many different letters."""
    return [len(set(turns[0]["content"])) / 10 for turns in completions]
'''
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
# Where a rate of 1e-2 takes this model, torch's norm in float32 is 2e-6 away from that in float64,
# and the monitor's is 3e-8 away.
GRPO = {
    "num_generations": 2,
    "max_completion_length": 8,
    "reward_funcs": "rewards.count_letters",
    "learning_rate": 1e-3,
}
# TRL 0.24 draws a new head before it sets a seed, so that no two trainings are equal.
REWARD = {"model_name_or_path": "../llama-scores"}


def make_case(client: Client, variant: str, command: str, **settings: object) -> Case:
    """Returns a case of `trl COMMAND` with `settings`."""
    given = {**SETTINGS, "dataset_name": "data", **settings}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return Case(
        client,
        variant,
        command=("trl", command, *options),
        files={"data/train.jsonl": DATA[command], "rewards.py": REWARDS},
    )


CASES = [
    make_case(NEWEST, "sft, full", "sft"),
    make_case(NEWEST, "sft, LoRA", "sft", **LORA),
    make_case(NEWEST, "dpo, LoRA", "dpo", **LORA),
    make_case(NEWEST, "dpo, full", "dpo"),
    make_case(NEWEST, "grpo, full", "grpo", **GRPO),
    make_case(NEWEST, "kto, full", "kto"),
    make_case(NEWEST, "reward, full", "reward"),
]
OLD_CASES = [
    make_case(OLDEST, "sft, full, oldest versions", "sft"),
    make_case(OLDEST, "dpo, full, oldest versions", "dpo"),
    make_case(OLDEST, "grpo, full, oldest versions", "grpo", **GRPO),
    make_case(OLDEST, "kto, full, oldest versions", "kto"),
    make_case(OLDEST, "reward, full, oldest versions", "reward", **REWARD),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES + OLD_CASES, ids=str)
def test_a_training_with_trl_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

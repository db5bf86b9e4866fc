"""ms-swift: `swift sft` and `swift rlhf`; its Trainers have default callbacks of their own."""

from __future__ import annotations

import pytest

from tests.clients.case import Case, Client
from tests.clients.conftest import Check
from tests.clients.rows import rows

CLIENT = Client("ms-swift", packages=("ms-swift==4.6.0",))

MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": row.question},
            {"role": "assistant", "content": row.chosen},
        ]
    }
    for row in rows()
]
PAIRS = [
    {**row, "rejected_response": texts.rejected}
    for row, texts in zip(MESSAGES, rows(), strict=True)
]
SETTINGS = {
    "model": "../llama",
    "model_type": "llama",
    "template": "default",
    "torch_dtype": "float32",
    "max_length": 64,
    "split_dataset_ratio": 0,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "output_dir": "out",
    "add_version": "false",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.1,
    "logging_steps": 1,
    "use_cpu": "true",
    "seed": 3,
    "report_to": "none",
    "use_hf": "true",
    "check_model": "false",  # asks a model hub
}
LORA = {"tuner_type": "lora", "lora_rank": 4}
FULL = {"tuner_type": "full"}
DPO = {"rlhf_type": "dpo", "dataset": "pairs.jsonl"}
SFT = {"dataset": "messages.jsonl"}


def make_case(variant: str, command: str, **settings: object) -> Case:
    """Returns a case of `swift COMMAND` with `settings`."""
    options = [f"--{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    return Case(
        CLIENT,
        variant,
        command=("swift", command, *options),
        files={"messages.jsonl": MESSAGES, "pairs.jsonl": PAIRS},
        environment={"PYTHONHASHSEED": "0"},  # it prints sets
    )


CASES = [
    make_case("sft, LoRA", "sft", **SFT, **LORA),
    make_case("sft, full", "sft", **SFT, **FULL),
    make_case("dpo, LoRA", "rlhf", **DPO, **LORA),
    make_case("dpo, full", "rlhf", **DPO, **FULL),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_with_swift_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

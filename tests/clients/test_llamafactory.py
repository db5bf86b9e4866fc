"""LLaMA-Factory: `llamafactory-cli train`, each stage and each kind of fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.case import Case, Client
from tests.clients.conftest import Check
from tests.clients.rows import rows

CLIENT = Client(
    "llamafactory",
    packages=("llamafactory==0.9.5",),
    without=("torchvision", "torchaudio"),
    stand_ins=("torchaudio",),
)

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
    {"instruction": row.question, "chosen": row.chosen, "rejected": row.rejected} for row in rows()
]
LABELLED = [
    {"instruction": row.question, "output": answer, "label": label}
    for row in rows(24)
    for answer, label in ((row.chosen, True), (row.rejected, False))
]
DATASETS = {
    "text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}},
    "messages": {
        "file_name": "messages.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "pairs": {
        "file_name": "pairs.jsonl",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "labelled": {
        "file_name": "labelled.jsonl",
        "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"},
    },
}
COMMON = {
    "model_name_or_path": "../llama",
    "do_train": True,
    "template": "default",
    "dataset_dir": ".",
    "cutoff_len": 64,
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "learning_rate": 1.0e-2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.1,
    "logging_steps": 1,
    "use_cpu": True,
    "seed": 3,
    "report_to": "none",
    "overwrite_cache": True,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}


def make_case(variant: str, dataset: str, **settings: Any) -> Case:
    """Returns a case that trains with `settings`."""
    return Case(
        CLIENT,
        variant,
        command=("llamafactory-cli", "train", "train.yaml"),
        files={
            "train.yaml": {**COMMON, "dataset": dataset, **settings},
            "dataset_info.json": DATASETS,
            "text.jsonl": [{"text": f"{row.question} {row.chosen}"} for row in rows()],
            "messages.jsonl": MESSAGES,
            "pairs.jsonl": PAIRS,
            "labelled.jsonl": LABELLED,
        },
        environment={"PYTHONHASHSEED": "0"},  # it prints sets
    )


FREEZE = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
PREFERENCE = {"stage": "dpo", **LORA}
CASES = [
    make_case("pt, full", "text", stage="pt", finetuning_type="full"),
    make_case("sft, full", "messages", stage="sft", finetuning_type="full"),
    make_case("sft, freeze", "messages", stage="sft", **FREEZE),
    make_case("sft, LoRA", "messages", stage="sft", **LORA),
    make_case("sft, DoRA", "messages", stage="sft", use_dora=True, **LORA),
    make_case("sft, LoRA+", "messages", stage="sft", loraplus_lr_ratio=16.0, **LORA),
    make_case("rm, LoRA", "pairs", stage="rm", **LORA),
    make_case("dpo, LoRA", "pairs", pref_loss="sigmoid", **PREFERENCE),
    make_case("orpo, LoRA", "pairs", pref_loss="orpo", **PREFERENCE),
    make_case("kto, LoRA", "labelled", stage="kto", **LORA),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_with_llamafactory_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

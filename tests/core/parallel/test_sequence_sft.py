"""TRL's SFTTrainer on two ranks against one process, in float64."""

from __future__ import annotations

import tempfile
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.forget import forget_last_trainer
from tests.support.sequence_cases import (
    VOCAB,
    Case,
    build_model,
    weights_of,
)
from tests.support.spawn import spawn

CASES = {
    "whole": {},
    "lora": {},
    "packed": {"packing": True, "max_length": 24},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
}


def words() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    model = Tokenizer(models.WordLevel(vocabulary, "<eos>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def build_trainer(name: str) -> Any:
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(12):
        length = int(torch.randint(9, 22, (1,), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0] * 4 + [1] * (length - 4)})
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="sequence-"),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    torch.manual_seed(0)
    adapters = LoraConfig(r=2, target_modules="all-linear") if name == "lora" else None
    return trl.SFTTrainer(
        model=build_model(Case()),
        args=trl.SFTConfig(**settings | CASES[name]),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:6]),
        processing_class=words(),
        peft_config=adapters,
    )


def train(name: str) -> dict[str, Any]:
    import ulysses_core as uc

    trainer = build_trainer(name)
    for param in trainer.model.parameters():  # PEFT makes adapters in float32
        param.data = param.data.double()
    size = dist.get_world_size() if dist.is_initialized() else 1
    uc.sequence_parallel(trainer, size)
    trainer.train()
    evaluation = trainer.evaluate()
    kept = ("loss", "grad_norm", "mean_token_accuracy", "entropy")
    return {
        "weights": weights_of(trainer.accelerator.unwrap_model(trainer.model)),
        "logged": [
            {k: float(e[k]) for k in kept} for e in trainer.state.log_history if "loss" in e
        ],
        "eval": {
            k: float(evaluation[f"eval_{k}"]) for k in ("loss", "mean_token_accuracy", "entropy")
        },
    }


def train_all(names: list[str]) -> dict[str, Any]:
    results = {}
    for name in names:
        try:
            results[name] = train(name)
        except Exception:  # noqa: BLE001 - the test of this case reports it
            results[name] = {"error": traceback.format_exc()}
        forget_last_trainer()
    return results


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return spawn(train_all, 1, args=[list(CASES)], timeout=120)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return spawn(train_all, 2, args=[list(CASES)], timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_sft_on_two_ranks_equals_one_process(one: dict, two: list[dict], name: str) -> None:
    truth = one[name]
    assert "error" not in truth, truth["error"]
    for result in (each[name] for each in two):
        assert "error" not in result, result["error"]
        for key, weight in truth["weights"].items():
            error = float((result["weights"][key] - weight).norm() / weight.norm().clamp(min=1e-9))
            assert error <= 1e-6, f"{key}: relative error {error}"
        for got, expected in zip(result["logged"], truth["logged"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4)
        assert result["eval"] == pytest.approx(truth["eval"], rel=1e-4)

"""What run.json says of a Trainer without being asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer
from ulysses_monitor.integrations.trainer_description import describe_trainer


def test_arguments_adapters_data_and_commit_are_in_run_json_without_secrets(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from ulysses_monitor.session import opening

    commit = {"commit": "abc", "branch": "trial", "is_dirty": True}
    monkeypatch.setattr(opening, "describe_repository", lambda: commit)
    token = "hf_" + "a1b2c3d4e5f6"
    trainer = build_trainer("plain", tmp_path, max_steps=1, hub_token=token)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, config)
    trainer.train_dataset = Dataset.from_list(trainer.train_dataset)
    um.Monitor(tmp_path / "run", tensorboard=False).attach(trainer)
    trainer.train()
    text = (tmp_path / "run/run.json").read_text()
    info = json.loads(text)
    assert info["training_arguments"]["learning_rate"] == 1e-2
    assert info["peft_config"]["default"]["r"] == 2
    assert info["peft_config"]["default"]["target_modules"] == ["q_proj", "v_proj"]
    data = info["train_dataset"]
    assert (data["class"], data["rows"]) == ("Dataset", 64)
    assert data["fingerprint"] == trainer.train_dataset._fingerprint
    assert info["git"] == commit
    assert token not in text


def test_what_cannot_be_described_is_absent() -> None:
    def breaks() -> Any:
        raise RuntimeError("no")

    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(to_dict=breaks),
        model=SimpleNamespace(peft_config={"default": object()}),
        train_dataset=iter([1]),
    )
    assert describe_trainer(trainer) == {"train_dataset": {"class": "list_iterator"}}
    assert describe_trainer(SimpleNamespace()) == {}  # type: ignore[arg-type]

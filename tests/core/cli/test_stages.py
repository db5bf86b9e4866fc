"""`ulysses train` in the preference stages, on two ranks that share rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ulysses_monitor as um

pytestmark = [pytest.mark.usefixtures("compiled_deepspeed"), pytest.mark.timeout(600)]

INFO = {
    "preferred": {
        "file_name": "preferred.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "tagged": {
        "file_name": "tagged.json",
        "columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"},
    },
}
STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"stage": "dpo"},
    "dpo-lora-zero3": {"stage": "dpo", "finetuning_type": "lora", "deepspeed": "zero3"},
    "orpo": {"stage": "dpo", "pref_loss": "orpo", "finetuning_type": "lora"},
    "simpo": {"stage": "dpo", "pref_loss": "simpo"},
    "rm": {"stage": "rm"},
    "kto": {"stage": "kto", "dataset": "tagged", "finetuning_type": "lora"},
}
REWARD = {"rm": "accuracy", "kto": "rewards/margins"}


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    world = make_world()
    data = world.path / "data"
    words = [f"list map set {i}" for i in range(40)]
    pairs = [
        {"instruction": w, "chosen": f"sorts every {w}", "rejected": f"holds the {w} last"}
        for w in words
    ]
    tagged = [
        {"instruction": p["instruction"], "output": p[side], "tag": side == "chosen"}
        for i, p in enumerate(pairs)
        for side in ("chosen", "rejected")[i % 2 : i % 2 + 1]
    ]
    (data / "preferred.json").write_text(json.dumps(pairs))
    (data / "tagged.json").write_text(json.dumps(tagged))
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps(info | INFO))
    return world


@pytest.mark.parametrize("name", STAGES)
def test_a_preference_stage_trains_evaluates_and_records(world: Any, name: str) -> None:
    settings: dict[str, Any] = {"dataset": "preferred", "template": "default", "logging_steps": 1}
    settings["output_dir"] = f"runs/{name}"
    world.config(f"{name}.yaml", **settings | STAGES[name])
    done = world.run("train", f"{name}.yaml", timeout=240)
    assert done.returncode == 0, done.stderr
    run = um.open_run(world.path / "runs" / name)
    assert run.info["status"] == "finished"
    frame = run.metrics("train/*", "grad/norm/total", "eval/loss/total")
    assert frame.loc[1:4, "grad/norm/total"].gt(0).all()
    assert frame["eval/loss/total"].notna().sum() == 2
    assert f"train/{REWARD.get(STAGES[name]['stage'], 'rewards/accuracies')}/total" in frame


def test_a_reward_model_is_saved_with_its_head(world: Any) -> None:
    config = json.loads((world.path / "runs/rm/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_a_key_of_another_stage_is_refused_by_name(world: Any) -> None:
    world.config("wrong.yaml", stage="rm", dataset="preferred", pref_beta=0.1)
    done = world.run("train", "wrong.yaml", "--dry-run")
    assert done.returncode == 2
    assert "pref_beta is a key of stage dpo and kto; stage is rm, so remove it" in done.stderr

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
SAMPLING: dict[str, dict[str, Any]] = {
    "grpo-alone": {
        "stage": "grpo",
        "beta": 0.1,
        "deepspeed": None,
        "sequence_parallel_size": 1,
        "num_iterations": 2,
    },
    "grpo": {"stage": "grpo", "finetuning_type": "lora", "beta": 0.1, "deepspeed": "zero3"},
    "ppo-alone": {
        "stage": "ppo",
        "deepspeed": None,
        "sequence_parallel_size": 1,
        "reward_model": "runs/rm",
        "reward_model_type": "full",
        "ppo_epochs": 2,
    },
    "ppo": {
        "stage": "ppo",
        "finetuning_type": "lora",
        "deepspeed": "zero2",
        "ppo_score_norm": True,
        "ppo_whiten_rewards": True,
        "ppo_epochs": 2,
    },
}
"""Of the stages that sample answers: on one process in full, and on two that share rows."""
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


@pytest.mark.parametrize("name", SAMPLING)
def test_a_sampling_stage_trains_evaluates_and_records(world: Any, name: str) -> None:
    settings: dict[str, Any] = {
        "dataset": "pairs",
        "template": "default",
        "logging_steps": 1,
        "output_dir": f"runs/{name}",
        "val_size": 4,
        "cutoff_len": 64,
        "reward_funcs": ["exact_answer", {"format": {"weight": 0.5}}, "rewards_of_mine:longer"],
    }
    is_ppo = name.startswith("ppo")
    settings |= (
        {"max_new_tokens": 8} if is_ppo else {"max_completion_length": 8, "num_generations": 4}
    )
    (world.path / "rewards_of_mine.py").write_text(
        "def longer(completions):\n    return [len(text) / 10 for text in completions]\n"
    )
    world.config(f"{name}.yaml", **settings | SAMPLING[name])
    nproc = ("--nproc", "1") if name.endswith("-alone") else ()
    done = world.run("train", f"{name}.yaml", *nproc, timeout=240)
    assert done.returncode == 0, done.stderr
    run = um.open_run(world.path / "runs" / name)
    assert run.info["status"] == "finished"
    frame = run.metrics("train/*", "grad/norm/total", "eval/*")
    assert frame.loc[1:4, "grad/norm/total"].gt(0).any()
    for metric in (
        "rewards/exact_answer/mean",
        "rewards/format/std",
        "rewards/longer/mean",
        "reward_std",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        *(("value_loss", "explained_variance") if is_ppo else ("frac_reward_zero_std",)),
        *(("rewards/reward_model/mean",) if name == "ppo-alone" else ()),
    ):
        assert frame[f"train/{metric}/total"].notna().any(), metric
    gap = frame["train/sampling/sampling_logp_difference/mean/total"].dropna()
    assert gap.between(0, 1e-4).all(), gap  # the sampler and the trainer are the same model
    assert frame["train/sampling/raw_importance_sampling_ratio/mean/total"].gt(0).any()


def test_a_reward_that_fails_on_one_rank_ends_all_with_one_line(world: Any) -> None:
    (world.path / "rewards_that_fail.py").write_text(
        "def once(completions, where):\n"
        "    return [float('nan') if row.endswith('line 5') else 0.0 for row in where]\n"
    )
    world.config(
        "failing.yaml",
        stage="grpo",
        dataset="pairs",
        template="default",
        val_size=None,
        cutoff_len=64,
        max_completion_length=4,
        num_generations=4,
        max_samples=8,
        deepspeed=None,
        sequence_parallel_size=1,
        output_dir="runs/failing",
        reward_funcs=["rewards_that_fail:once"],
    )
    done = world.run("train", "failing.yaml", "--nproc", "2", timeout=240)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "reward once" in line]
    assert "pairs.jsonl, line 5, prompt" in line
    assert "returned nan; expected a finite number or None" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "reward_funcs is empty; expected one or more of exact_answer"),
        ({"reward_funcs": ["exact"]}, "reward_funcs: 'exact' is not a reward"),
        (
            {"reward_funcs": ["format"], "num_generations": 3},
            "num_generations is 3; expected a divisor of the answers that are sampled at a time",
        ),
        (
            {"reward_funcs": ["format"], "val_size": 4, "per_device_eval_batch_size": 6},
            "per_device_eval_batch_size is 6, on all processes 6; expected a multiple of the 4",
        ),
        (
            {"reward_funcs": ["format"], "model_config.max_position_embeddings": 64},
            "cutoff_len is 64 and answers have up to 4 tokens, but the model has 64 positions; "
            "set cutoff_len=60",
        ),
    ],
)
def test_a_dry_run_refuses_what_grpo_cannot_train_with(
    world: Any, changes: dict[str, Any], message: str
) -> None:
    settings = {"stage": "grpo", "dataset": "pairs", "template": "default", "cutoff_len": 64}
    settings |= {"max_completion_length": 4, "num_generations": 4, "val_size": None}
    dotted = [f"{key}={value}" for key, value in changes.items() if "." in key]
    plain = {key: value for key, value in changes.items() if "." not in key}
    world.config("refused.yaml", **settings | plain)
    done = world.run("train", "refused.yaml", "--dry-run", *dotted)
    assert done.returncode == 2
    assert message in done.stderr

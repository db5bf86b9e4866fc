"""`ulysses train --dry-run` finds, without writing, what the start would find before a model loads.

Each case is a config that the real start would refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.cli.conftest import World
from ulysses_core.cli import main

LORA = {"finetuning_type": "lora"}

CASES: list[tuple[dict[str, Any], str]] = [
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected an integer"),
    ({"per_device_train_batch_size": -2}, "per_device_train_batch_size is -2; expected an integer"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; expected an integer"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected an integer"),
    ({"learning_rate": -1e-4}, "learning_rate is -0.0001; expected a number of 0 or more"),
    ({"learning_rate": float("nan")}, "learning_rate is nan; expected a number of 0 or more"),
    ({"learning_rate": float("inf")}, "learning_rate is inf; expected a number of 0 or more"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1; expected a number of 0 or more"),
    ({"weight_decay": float("nan")}, "weight_decay is nan; expected a number of 0 or more"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; expected a number of 0 or more"),
    ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; expected a number of 0 or more and below 1"),
    ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5; expected a number from 0 to 1"),
    ({"warmup_ratio": -0.1}, "warmup_ratio is -0.1; expected a number from 0 to 1"),
    ({"warmup_steps": -1}, "warmup_steps is -1"),
    ({"max_steps": 0}, "max_steps is 0; expected an integer of 1 or more, or -1"),
    ({"max_steps": None, "num_train_epochs": 0}, "num_train_epochs is 0.0; expected a number"),
    ({"adjust_lr": float("inf")}, "adjust_lr is inf; expected"),
    ({"lora_rank": 0, **LORA}, "lora_rank is 0; expected an integer above 0"),
    ({"lora_target": "q_prj", **LORA}, "lora_target is 'q_prj': "),
    ({"lora_target": "q_prj", "pissa_init": True, **LORA}, "lora_target is 'q_prj': "),
    (
        {"model_config": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}},
        "model_type is 'bloom', which is not supported: its attention code is its own",
    ),
    ({"sequence_parallel_size": 3}, "sequence_parallel_size is 3, which does not divide 2"),
    ({"output_dir": "file/run"}, "file is a file; expected a directory"),
    ({"bf16": True, "fp16": True}, "training arguments: "),
    ({"bf16": "float13"}, "bf16 is 'float13'; expected"),
    ({"optim": "adamm"}, "optim is 'adamm' (did you mean"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin' (did you mean 'cosine'?)"),
    ({"eval_strategy": "steps", "val_size": 0}, "eval_strategy is steps, but there is no data"),
    ({"load_best_model_at_end": True, "save_strategy": "epoch"}, "training arguments: "),
    ({"val_size": 500}, "val_size is 500, which leaves no examples to train on"),
    ({"dataset": "none"}, "dataset 'none' is not in data/dataset_info.json"),
    ({"dataset": "empty"}, "empty.jsonl"),
    ({"dataset": "misnamed"}, "misnamed.columns.prompt is 'txt', which data/text.jsonl does not"),
    ({"dataset": "lost"}, "file_name is 'lost.jsonl'; no such file"),
    ({"deepspeed": "zero4"}, "deepspeed is 'zero4' (did you mean"),
    ({"deepspeed": "broken.json"}, "broken.json, line 1: not valid JSON"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 7}}},
        "deepspeed: zero_optimization: stage is 7",
    ),
    ({"deepspeed": {"zero_optimization": {"stagee": 2}}}, "deepspeed: zero_optimization: unknown"),
    ({"deepspeed": {"zero_optimization": 2}}, "zero_optimization is 2; expected a mapping"),
    (
        {"monitor": {"policies": ["lr_boost", "warmup_cosine"]}},
        "policies lr_boost and warmup_cosine both set the learning rate",
    ),
    (
        {"monitor": {"policies": ["warmup_cosine"]}},
        "policy warmup_cosine plans the learning rate, and so does the Trainer's linear schedule",
    ),
    ({"monitor": {"rules": ["not_there:x"]}}, "rule not_there:x: cannot be imported"),
    ({"model_config": {"model_type": "lama"}}, "model_type is 'lama' (did you mean 'llama'?)"),
    (
        {"model_config": {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}},
        "model_config: cannot build",
    ),
    ({"tokenizer_name_or_path": "data"}, "tokenizer data: cannot load it"),
    ({"flash_attn": "fa3"}, "flash_attn is 'fa3' (did you mean 'fa2'?)"),
]


@pytest.fixture(scope="module")
def place(make_world: Callable[[], World]) -> World:
    world = make_world()
    info = json.loads((world.path / "data/dataset_info.json").read_text())
    info["empty"] = {"file_name": "empty.jsonl"}
    info["misnamed"] = {"file_name": "text.jsonl", "columns": {"prompt": "txt"}}
    info["lost"] = {"file_name": "lost.jsonl"}
    (world.path / "data/dataset_info.json").write_text(json.dumps(info))
    (world.path / "data/empty.jsonl").touch()
    (world.path / "broken.json").write_text("{stage")
    (world.path / "file").touch()
    (world.path / "rules_of_dry_run.py").write_text("def nothing(history):\n    return None\n")
    return world


def dry_run(
    place: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.chdir(place.path)
    monkeypatch.setattr("sys.argv", ["ulysses", "train", "pt.yaml", "--nproc", "2", "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        main()
    out, error = capsys.readouterr()
    return int(caught.value.code or 0), out, error


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=lambda case: str(case)[:60])
def test_what_the_start_would_refuse_is_one_line_and_nothing_is_written(
    place: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    expected: str,
) -> None:
    place.config(**changes)
    before = files(place.path)
    code, _, error = dry_run(place, monkeypatch, capsys)
    assert (code, error.count("\n")) == (2, 1), error
    assert expected in error
    assert files(place.path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "pissa_init": True},
        {"finetuning_type": "lora", "use_dora": True},
        {"monitor": {"rules": ["rules_of_dry_run:nothing"], "policies": "adaptive"}},
        {"eval_strategy": "steps", "eval_steps": 2, "warmup_ratio": 0.5, "deepspeed": "zero3"},
        {"check_family": False, "model_config": {"model_type": "bloom", "hidden_size": 32}},
    ],
    ids=["plain", "lora", "dora", "monitor", "evaluation", "risky"],
)
def test_a_config_that_would_start_passes(
    place: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
) -> None:
    place.config(**changes)
    before = files(place.path)
    code, out, error = dry_run(place, monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert "plan of pt" in out
    assert files(place.path) == before

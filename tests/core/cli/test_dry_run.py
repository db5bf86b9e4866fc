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
FREEZE = {"finetuning_type": "freeze"}

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
    ({"flash_attn": "fa2"}, "flash_attn is fa2, which needs the package flash-attn and a GPU"),
    ({"report_to": "swanlab"}, "report_to is swanlab, whose package is not installed"),
    ({"report_to": "tensorbord"}, "report_to is 'tensorbord'; allowed: none, all, "),
    ({"optim": "galore_adamw"}, "optim is galore_adamw: "),
    ({"optim": "paged_adamw_8bit"}, "optim is paged_adamw_8bit: "),
    ({"template": "qwen2_vl"}, "template is 'qwen2_vl'; images, video and audio are not trained"),
    ({"use_galore": True}, "use_galore is True; transformers has GaLore: set optim: galore_adamw"),
    ({"use_unsloth": True}, "use_unsloth is True; Unsloth replaces the model's forward pass"),
    ({"infer_backend": "vlm"}, "infer_backend is 'vlm' (did you mean 'vllm'?)"),
    ({"ray_num_workers": "two"}, "ray_num_workers is 'two'; expected an integer"),
    ({"do_train": False}, "do_train is false; set do_eval: true to evaluate"),
    ({"do_eval": True, "val_size": 0}, "do_eval is true, but there is no data to evaluate on"),
    ({"early_stopping_steps": 1}, "early_stopping_steps needs evaluations; set eval_strategy"),
    ({"disable_gradient_checkpointing": True, "gradient_checkpointing": True}, "are both true"),
    ({"deepspeed": "examples/deepspeed/ds_z2_autotp_config.json"}, "it cuts layers (tensor"),
    ({"lora_init": "loftq", **LORA}, "lora_init is 'loftq'; PEFT computes it with bitsandbytes"),
    (
        {"lora_init": "eva", "deepspeed": "zero3", **LORA},
        "lora_init is eva, which runs the whole model before training starts, and ZeRO-3 cuts it",
    ),
    ({"lora_init": "eva", "lora_rank": 9, **LORA}, "lora_rank is 9; expected at most 8, a quarter"),
    ({"lora_init": "lora_ga", "stage": "dpo", **LORA}, "lora_init is lora_ga, which takes the"),
    ({"lora_init": "olora", "lora_init_rows": 4, **LORA}, "lora_init_rows is set, which lora_init"),
    ({"lora_init": "pisa", **LORA}, "lora_init is 'pisa' (did you mean 'pissa'?)"),
    ({"lora_init": "pissa"}, "lora_init is for finetuning_type lora; finetuning_type is full"),
    ({"use_dora": True}, "use_dora is for finetuning_type lora; finetuning_type is full"),
    ({"lora_init": "olora", "pissa_init": True, **LORA}, "pissa_init and lora_init: olora are"),
    ({"lora_init": "olora", "lora_rank": 40, **LORA}, "lora_rank is 40; expected at most 32, the"),
    (
        {"lora_init": "orthogonal", "lora_rank": 3, **LORA},
        "lora_rank is 3; expected an even number",
    ),
    ({"lora_init_correct_base": False, **LORA}, "which only lora_init orthogonal_small takes"),
    ({"pissa_iter": -2, **LORA}, "pissa_iter is -2; expected an integer of -1 or more"),
    ({"loraplus_lr_ratio": 0, **LORA}, "loraplus_lr_ratio is 0; expected a number above 0"),
    ({"loraplus_lr_ratio": 4}, "loraplus_lr_ratio is for finetuning_type lora; finetuning_type is"),
    (
        {"loraplus_lr_ratio": 4, "deepspeed": {"optimizer": {"type": "AdamW"}}, **LORA},
        "loraplus_lr_ratio is set, but the DeepSpeed settings name an optimizer",
    ),
    ({"adapter_name_or_path": "none", **LORA}, "adapter_name_or_path is 'none', but there is no"),
    ({"adapter_name_or_path": "data", **LORA}, "data/adapter_config.json: no such file; expected"),
    ({"adapter_name_or_path": "other", **LORA}, "adapter other: "),
    ({"adapter_name_or_path": "data"}, "adapter_name_or_path is for finetuning_type lora and oft"),
    ({"create_new_adapter": True, **LORA}, "create_new_adapter is true without adapter_name_or_p"),
    (
        {"adapter_name_or_path": "data", "lora_init": "pissa", **LORA},
        "lora_init is pissa, but training continues data; remove it, or set create_new_adapter",
    ),
    (
        {**FREEZE, "freeze_trainable_layers": 0},
        "freeze_trainable_layers is 0; expected a number of",
    ),
    ({**FREEZE, "freeze_trainable_layers": "two"}, "freeze_trainable_layers is 'two'; expected an"),
    ({**FREEZE, "freeze_trainable_modules": "mpl"}, "freeze_trainable_modules is 'mpl' (did you"),
    ({**FREEZE, "freeze_extra_modules": "wte"}, "freeze_extra_modules is 'wte'; allowed: embed"),
    (
        {**FREEZE, "use_llama_pro": True, "freeze_trainable_layers": 3},
        "freeze_trainable_layers is 3; expected a divisor of 2, the number of the model's layers",
    ),
    ({"use_llama_pro": True}, "use_llama_pro is for finetuning_type freeze and lora; finetuning"),
    ({"finetuning_type": "oft", "oft_rank": 4}, "oft_rank is 4 and oft_block_size is 32; expected"),
    ({"finetuning_type": "oft", "oft_target": "q_prj"}, "oft_target is 'q_prj': "),
    ({"finetuning_type": "adapter"}, "finetuning_type is 'adapter'; allowed: lora, oft, freeze,"),
    ({"quantization_bit": 4, **LORA}, "quantization_bit needs model_name_or_path; model_config is"),
    ({"quantization_bit": 5, **LORA}, "quantization_bit is 5; allowed: 4, 8"),
    ({"train_from_scratch": True}, "train_from_scratch needs model_name_or_path; model_config is"),
    ({"stage": "dpo", "ref_model": "none"}, "ref_model is 'none', but there is no such folder"),
    ({"stage": "dpo", "ref_model_adapters": "a"}, "ref_model_adapters is set without ref_model"),
    (
        {"stage": "dpo", "pref_loss": "orpo", "ref_model": "data"},
        "pref_loss is orpo, which has no reference model; remove ref_model",
    ),
    ({"stage": "rm", "use_dft_loss": True}, "use_dft_loss is for stages pt and sft; stage is rm"),
    ({"export_size": 0}, "export_size is 0; expected an integer above 0"),
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
    other = {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    (world.path / "other").mkdir()
    (world.path / "other/adapter_config.json").write_text(json.dumps(other))
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
        {"finetuning_type": "lora", "lora_init": "orthogonal_small", "loraplus_lr_ratio": 16},
        {"finetuning_type": "oft", "oft_block_size": 4, "use_galore": False, "galore_rank": 8},
        {"finetuning_type": "freeze", "freeze_extra_modules": "norm", "report_to": "tensorboard"},
        {"do_train": False, "do_eval": True, "deepspeed": "examples/deepspeed/ds_z0_config.json"},
        {"monitor": {"rules": ["rules_of_dry_run:nothing"], "policies": "adaptive"}},
        {"eval_strategy": "steps", "eval_steps": 2, "warmup_ratio": 0.5, "deepspeed": "zero3"},
        {"check_family": False, "model_config": {"model_type": "bloom", "hidden_size": 32}},
    ],
    ids=[
        "plain",
        "lora",
        "dora",
        "init",
        "oft",
        "freeze",
        "only-evaluate",
        "monitor",
        "evaluation",
        "risky",
    ],
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


def test_a_key_that_changes_nothing_says_what_it_means(
    place: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.config(plot_loss=True, ray_num_workers=4, export_dir="merged")
    code, out, _ = dry_run(place, monkeypatch, capsys)
    assert code == 0
    assert "plot_loss: the report always has the plot\n" in out
    assert "ray_num_workers: Ray is not used; --nproc sets the number of processes" in out
    assert "export_dir: for ulysses export\n" in out

"""A stage of `ulysses train` on two SGD steps, split over ranks or on one process, in float64.

The stage's own code reads the config, makes the rows and builds the trainer. The model is put in
between, so that it is in float64 and the same everywhere.

A new stage needs an entry in `KINDS`: the keys of its config, and the rows that it reads.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.forget import forget_last_trainer
from tests.support.sequence_cases import VOCAB, weights_of, whole
from tests.support.stage_cases import build_words, preferences
from ulysses_core.parallel.families.proof import Float64

__all__ = [
    "ENGINES",
    "KINDS",
    "ParityCase",
    "build",
    "find_engine",
    "shard",
    "train_all",
    "train_watched",
    "write_rows",
]

SAMPLED: dict[str, Any] = {
    "dataset": "conversations",
    "cutoff_len": 16,
    "shuffle_dataset": False,
    "reward_funcs": [
        "tests.support.stage_cases:reward_small_words",
        {"tests.support.stage_cases:reward_length": {"weight": 0.5}},
    ],
}
"""Of the kinds that sample answers, which they train on in both steps."""
KINDS: dict[str, dict[str, Any]] = {
    "pt": {"stage": "pt", "dataset": "documents", "packing": False},
    "pt-packed": {"stage": "pt", "dataset": "documents", "cutoff_len": 24, "neat_packing": True},
    "sft": {"stage": "sft", "dataset": "conversations"},
    "sft-packed": {"stage": "sft", "dataset": "conversations", "cutoff_len": 40, "packing": True},
    "rm": {"stage": "rm", "dataset": "pairs"},
    "dpo": {"stage": "dpo", "dataset": "pairs"},
    "dpo-orpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"},
    "dpo-simpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"},
    "kto": {"stage": "kto", "dataset": "tagged"},
    "grpo": {
        **SAMPLED,
        "stage": "grpo",
        "max_completion_length": 6,
        "num_generations": 2,
        "num_iterations": 2,
        "beta": 0.1,
        "entropy_coef": 0.1,  # without it the first loss is 0
    },
    "ppo": {
        **SAMPLED,
        "stage": "ppo",
        "max_new_tokens": 6,
        "ppo_epochs": 2,
        "ppo_score_norm": True,
        "ppo_whiten_rewards": True,
        "ppo_target": 0.5,
        "horizon": 100,
    },
}
"""Kinds of training, and the keys of their configs."""
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One training of two steps with 12 query and 3 key/value heads."""

    kind: str
    engine: str = "ddp"
    adapters: bool = False
    size: int = 2

    @property
    def label(self) -> str:
        return f"{self.kind}-{self.engine}-{'lora' if self.adapters else 'full'}-{self.size}"

    @property
    def alone(self) -> ParityCase:
        return replace(self, engine="ddp", size=1)


def write_rows(folder: Path) -> None:
    """Writes the data sets of all stages, and a tokenizer."""
    pairs = preferences()
    texts = {
        "documents": [{"text": p["prompt"] + p["chosen"]} for p in pairs],
        "conversations": [{"instruction": p["prompt"], "output": p["chosen"]} for p in pairs],
        "pairs": [
            {"instruction": p["prompt"], "chosen": p["chosen"], "rejected": p["rejected"]}
            for p in pairs
        ],
        "tagged": [
            {"instruction": p["prompt"], "output": p[side], "tag": side == "chosen"}
            for i, p in enumerate(pairs)
            for side in [("chosen", "rejected")[i % 2]]
        ],
    }
    columns = {
        "documents": {"columns": {"prompt": "text"}},
        "conversations": {},
        "pairs": {
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "tagged": {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"}},
    }
    for name, rows in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json", **more} for name, more in columns.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    tokenizer = build_words()
    # Without words of its own, of which the tokenizer has none.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)


def build_model(task: str, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=3,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        num_labels=1,
    )
    kind = LlamaForSequenceClassification if task == "score" else LlamaForCausalLM
    return kind(config).double()


def build(case: ParityCase, folder: str, *, model_seed: int = 0, **changes: Any) -> Any:
    """Builds the trainer of a stage from a config; `changes` are more keys."""
    from ulysses_core.data import load_datasets
    from ulysses_core.trainers.adapters import add_adapters
    from ulysses_core.trainers.arguments import build_training_arguments
    from ulysses_core.trainers.build import build_tokenizer
    from ulysses_core.trainers.stage import Parts, find_stage, load_config

    keys: dict[str, Any] = {
        "model_name_or_path": folder,
        "dataset_dir": folder,
        "finetuning_type": "lora" if case.adapters else "full",
        "deepspeed": case.engine if case.engine.startswith("zero") else None,
        "output_dir": tempfile.mkdtemp(prefix="parity-"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "monitor": False,
    }
    path = Path(keys["output_dir"], "config.yaml")
    path.write_text(yaml.safe_dump(keys | KINDS[case.kind] | changes))
    config = load_config(path)
    stage = find_stage(config.finetuning.stage)
    model = add_adapters(build_model(stage.task, model_seed), config, stage.task)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.double()
        if "lora_" in name:  # not zero, or the differences would be nothing but rounding
            parameter.data.normal_(std=0.1, generator=draw)
        if "v_head" in name:  # so that values differ and matter
            parameter.data.normal_(std=0.3, generator=draw)
    args = build_training_arguments(config, *stage.make_arguments(config))
    args.output_dir = keys["output_dir"]
    tokenizer = build_tokenizer(config.model)
    return stage.build_trainer(
        Parts(
            config=config,
            args=args,
            model=model,
            tokenizer=tokenizer,
            data=load_datasets(config.data, stage, tokenizer, args.seed, args.device),
            make_reference=lambda: build_model(stage.task, model_seed + 1).requires_grad_(False),
        )
    )


def watch(trainer: Any) -> dict[str, Any]:
    """Returns what the trainer will find: its first loss, and its first gradients."""
    from transformers import TrainerCallback

    found: dict[str, Any] = {"losses": [], "gradients": {}}
    compute = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        found["losses"].append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    def keep(read: Any) -> None:
        found["engine"] = find_engine(trainer)
        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        if not found["gradients"]:
            found["gradients"] = {
                n: read(p).detach().double().clone() for n, p in named if p.requires_grad
            }

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            engine = trainer.model_wrapped
            if not hasattr(engine, "is_gradient_accumulation_boundary") or "step" in vars(engine):
                return
            from deepspeed.utils import safe_get_full_grad

            take = engine.step

            def step(*args: Any, **kwargs: Any) -> Any:
                keep(safe_get_full_grad)
                return take(*args, **kwargs)

            engine.step = step

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if not hasattr(trainer.model_wrapped, "is_gradient_accumulation_boundary"):
                keep(lambda p: whole(p.grad))

    trainer.compute_loss = compute_loss
    trainer.add_callback(Watch())
    return found


def shard(trainer: Any) -> None:
    """Gives a Trainer FSDP2, which accelerate gives it on GPUs only."""
    from torch.distributed.fsdp import fully_shard

    model = trainer.model
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    trainer.accelerator.prepare_model = lambda model, *_, **__: model


def find_engine(trainer: Any) -> str:
    """Returns the engine that is really at work."""
    wrapped = trainer.model_wrapped
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero{wrapped.zero_optimization_stage()}"
    if any(hasattr(p, "full_tensor") for p in wrapped.parameters()):
        return "fsdp2"
    return "ddp" if hasattr(wrapped, "require_backward_grad_sync") else "plain"


def train_watched(trainer: Any, *, size: int, engine: str) -> dict[str, Any]:
    """Trains in float64; returns losses, first gradients, logged numbers and weights."""
    import ulysses_core as uc

    uc.sequence_parallel(trainer, size)
    if engine == "fsdp2":
        shard(trainer)
    found = watch(trainer)
    with Float64():
        trainer.train()
    timing = ("runtime", "second", "epoch", "flos", "step_time")
    found["logged"] = [
        {k: float(v) for k, v in entry.items() if not any(word in k for word in timing)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    found["weights"] = weights_of(trainer.accelerator.unwrap_model(trainer.model))
    return found


def train_all(cases: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """The child: every case in turn; a case that fails on all ranks does not stop the others."""
    results = {}
    for settings in cases:
        case = ParityCase(**settings)
        try:
            trainer = build(case, folder)
            results[case.label] = train_watched(trainer, size=case.size, engine=case.engine)
        except Exception:  # noqa: BLE001 - the test of this case reports it
            results[case.label] = {"error": traceback.format_exc()}
        forget_last_trainer()
    return results

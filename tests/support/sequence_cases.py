"""Small models of many architectures, trained with sequence parallelism or on one process."""

from __future__ import annotations

import tempfile
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.support.forget import forget_last_trainer

__all__ = [
    "IGNORE",
    "MODELS",
    "VOCAB",
    "Case",
    "build_model",
    "build_trainer",
    "collate",
    "examples",
    "fingerprint",
    "train_all",
    "weights_of",
    "whole",
]

VOCAB = 61
WINDOWED = {"sliding_window": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", WINDOWED),
    "phi3": ("Phi3", {"original_max_position_embeddings": 64}),
    "olmo2": ("Olmo2", {}),
    "gemma": ("Gemma", {}),
    # Scores and logits capped, every other layer windowed; transformers takes eager by itself,
    # which in float64 makes NaN of padding that sees nothing within a window of 5.
    "gemma2": ("Gemma2", {"sliding_window": 12, "attn_logit_softcapping": 0.5}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "experts_implementation": "eager",  # the others have no float64
        },
    ),
}
"""transformers' class names, and settings of their own."""
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training. `rows` is the micro-batch of a whole sequence group."""

    size: int = 2
    groups: int = 1
    zero: int | None = None
    """DeepSpeed's stage; None for DDP."""
    model: str = "llama"
    heads: int = 4
    key_heads: int = 2
    accumulate: int = 1
    rows: int = 3
    data: str = "ragged"
    checkpointing: bool = False
    evaluated: int = 7
    """Rows to evaluate. With several groups they must fill every batch, as on one process."""
    has_policy: bool = False
    """Whether a policy changes gradients and the learning rate."""

    @property
    def label(self) -> str:
        engine = "ddp" if self.zero is None else f"zero{self.zero}"
        heads = f"h{self.heads}k{self.key_heads}"
        extra = "-checkpointing" * self.checkpointing + "-policy" * self.has_policy
        return (
            f"{self.model}-{heads}-{engine}-sp{self.size}x{self.groups}-ga{self.accumulate}"
            f"-rows{self.rows}-{self.data}{extra}-eval{self.evaluated}"
        )

    @property
    def alone(self) -> Case:
        """The same training on one process."""
        rows = self.rows * self.groups
        settings = vars(self) | {"size": 1, "groups": 1, "zero": None, "rows": rows}
        return Case(**settings)


# -- what is trained --------------------------------------------------------------------------


def build_model(case: Case, **more: Any) -> Any:
    import transformers

    settings = {
        "hidden_size": 8 * case.heads,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.key_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    name, own = MODELS[case.model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | own | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # Stage 0 refuses to reduce float64 gradients.
    return model.float() if case.zero == 0 else model.double()


def examples(kind: str) -> list[dict[str, Tensor]]:
    """Twelve rows; the lengths of a batch rarely divide by the number of ranks."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(7 if kind == "short_epoch" else 12):
        length = int(torch.randint(9, 22, (1,), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, length, (1,), generator=generator))] = IGNORE
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(kind: str) -> Any:
    def pad(values: Tensor, size: int, value: int) -> Tensor:
        missing = size - len(values)
        return F.pad(values, (missing, 0) if kind == "left" else (0, missing), value=value)

    def make(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        size = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.stack([pad(row["input_ids"], size, 0) for row in rows]),
            "labels": torch.stack([pad(row["labels"], size, IGNORE) for row in rows]),
        }
        mask = torch.stack([pad(torch.ones_like(row["input_ids"]), size, 0) for row in rows])
        if kind == "packed":  # documents of 4 tokens and what remains, one row after the other
            at = torch.arange(size)
            batch["position_ids"] = torch.where(at < 4, at, at - 4).repeat(len(rows), 1)
            batch["labels"][:, 4] = IGNORE
        else:
            batch["attention_mask"] = mask
        half = -(-size // 2)  # tokens in a slice of two
        if kind == "no_label_in_a_slice":
            batch["labels"][:, half:] = IGNORE
            batch["labels"][:, 1] = batch["input_ids"][:, 1]
        if kind == "label_on_the_edge":
            batch["labels"][:] = IGNORE
            here = mask[:, half] == 1
            batch["labels"][here, half] = batch["input_ids"][here, half]
        return batch

    return make


def build_trainer(case: Case, *, model: Any = None, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    deepspeed = {
        "zero_optimization": {"stage": case.zero or 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="sequence-"),
        "per_device_train_batch_size": case.rows,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": case.accumulate,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": case.checkpointing,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "deepspeed": None if case.zero is None else deepspeed,
    }
    keywords = {k: more.pop(k) for k in ("train_dataset", "compute_metrics") if k in more}
    data = examples(case.data)
    return Trainer(
        build_model(case) if model is None else model,
        TrainingArguments(**settings | more),
        train_dataset=keywords.get("train_dataset", data),
        eval_dataset=data[: case.evaluated],
        data_collator=collate(case.data),
        compute_metrics=keywords.get("compute_metrics"),
    )


def fingerprint(prediction: Any) -> dict[str, float]:
    """Depends on every label and on every logit of a labelled token, and on their places."""
    labels = torch.as_tensor(prediction.label_ids)
    logits = torch.as_tensor(prediction.predictions)[labels.ne(IGNORE)]
    return {"logits": weighted(logits), "labels": weighted(labels.double())}


def weighted(values: Tensor) -> float:
    places = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64)
    return float(values.flatten().double() @ places)


def every_action(history: Any) -> list[Any]:
    """An action of every kind that edits gradients, and one on the rate."""
    import ulysses_monitor as um

    norm = history[-1]["grad/norm/total"]
    return [
        um.Action(kind="centralize", targets=("*mlp*",)),
        um.Action(kind="add_noise", values={"std": 1e-3}),
        um.Action(kind="clip_rows", values={"ratio": 0.5}, targets=("*self_attn*",)),
        um.Action(kind="scale_each", values={"lm_head.weight": 0.5}),
        um.Action(kind="clip_each", values={"model.norm.weight": 1e-3}),
        um.Action(kind="clip_value", values={"limit": 0.01}, targets=("*embed*",)),
        um.Action(kind="freeze", targets=("*layers.0*layernorm*",)),
        um.Action(kind="clip_norm", values={"max_norm": 0.5 * norm}),
        um.Action(kind="lr_factor", values={"factor": 1.5}),
    ]


def train(case: Case) -> dict[str, Any]:
    import ulysses_core as uc
    import ulysses_monitor as um

    trainer = build_trainer(case, compute_metrics=fingerprint)
    sink = um.MemorySink()
    folder = tempfile.mkdtemp(prefix="sequence-run-")
    policies = [every_action] if case.has_policy else []
    monitor = um.Monitor(
        folder,
        tensorboard=False,
        sinks=[sink],
        if_exists="overwrite",
        rules=[],
        policies=policies,
    )
    monitor.attach(trainer)
    uc.sequence_parallel(trainer, case.size)
    trainer.train()
    evaluation = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "weights": weights_of(model),
        "losses": [entry["loss"] for entry in logged],
        "metrics": [r.to_dict() for r in sink.records if "train/loss/total" in r],
        "eval": {k: float(evaluation[k]) for k in ("eval_loss", "eval_logits", "eval_labels")},
    }


def weights_of(model: Any) -> dict[str, Tensor]:
    """Whole, also where ZeRO-3 has left a stand-in or FSDP2 a shard."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    gathered: Any = nullcontext()
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    with gathered:
        return {n: whole(p).double().clone() for n, p in model.state_dict().items()}


def whole(values: Any) -> Tensor:
    """Returns all of a tensor of which FSDP2 keeps a shard on each rank."""
    full: Tensor = values.full_tensor() if hasattr(values, "full_tensor") else values
    return full.detach()


def train_all(cases: list[dict]) -> dict[str, Any]:
    """The child: every case in turn; a case that fails on all ranks does not stop the others."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results = {}
    for settings in cases:
        case = Case(**settings)
        try:
            results[case.label] = train(case)
        except Exception:  # noqa: BLE001 - it is told by the test of this case
            results[case.label] = {"error": traceback.format_exc()}
        forget_last_trainer()
    return results

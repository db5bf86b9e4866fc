"""Small Trainers under each engine, and checks that run within the ranks' processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.forget import forget_last_trainer

__all__ = [
    "VOCAB",
    "build_trainer",
    "rank",
    "run_checks",
    "weights",
    "world",
    "zero_optimizer",
]

VOCAB = 31


def build_trainer(engine: str, folder: Path, *, trainer_class: Any = None, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    deepspeed = {
        "zero_optimization": {"stage": 3 if engine == "zero3" else 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    settings: dict[str, Any] = {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "deepspeed": deepspeed if engine.startswith("zero") else None,
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=32,
    )
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, VOCAB, (9,), generator=generator) for _ in range(64)]
    data = [{"input_ids": row, "labels": row, "attention_mask": row * 0 + 1} for row in rows]
    keywords = {k: more.pop(k) for k in ("compute_metrics", "callbacks") if k in more}
    return (trainer_class or Trainer)(
        LlamaForCausalLM(config),
        TrainingArguments(**settings | more),
        train_dataset=data,
        eval_dataset=data[:8],
        **keywords,
    )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def weights(trainer: Any) -> dict[str, Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(hasattr(param, "ds_tensor") for param in model.parameters()):
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).clone() for n, p in model.named_parameters()}
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def zero_optimizer(trainer: Any) -> Any:
    return getattr(trainer.model_wrapped, "optimizer", None)


def run_checks(
    checks: Mapping[str, Callable[[str, Path], None]], root: str, engines: list[str]
) -> dict[str, str]:
    """The child: every check with every engine; what went wrong, or nothing."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    words = {}
    for engine in engines:
        for name, check in checks.items():
            folder = Path(root, f"{engine}-{name}")
            folder.mkdir(exist_ok=True, parents=True)
            try:
                check(engine, folder)
                words[f"{engine}-{name}"] = ""
            except Exception:  # noqa: BLE001 - it is told by the test of this check
                words[f"{engine}-{name}"] = traceback.format_exc()
            forget_last_trainer()
    return words

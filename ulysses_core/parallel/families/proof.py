"""Trains small models of a family on this process's share of rows, to be compared with one process.

Two steps of SGD in float64 on rows that are longer than every window of the model.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ulysses_core.parallel.families.small import VOCABULARY, small_config

__all__ = ["compare", "train_small"]

_RATE = 0.05


def make_rows(kind: str) -> dict[str, Tensor]:
    """Returns three rows of 41 tokens: padded on the right, on the left, or packed."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (3, 41), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    if kind == "packed":
        at = torch.arange(41)
        positions = torch.where(at < 18, at, at - 18).repeat(3, 1)
        labels[:, 18] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    mask = torch.ones_like(ids)
    for row, length in enumerate((41, 40, 37)):
        hidden = slice(length, None) if kind == "right" else slice(0, 41 - length)
        mask[row, hidden], ids[row, hidden], labels[row, hidden] = 0, 0, -100
        if kind == "left":
            labels[row, 41 - length] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class _Float64(TorchFunctionMode):
    """Computes in float64 what models compute in float32: norms, RoPE, softmax, the loss."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ARG002 - torch fixes the signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        given = {k: _widen(v) for k, v in (kwargs or {}).items()}
        return func(*(_widen(a) for a in args), **given)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def train_small(kind: type[Any], option: tuple[str, Any] | None, rows: str, size: int) -> Any:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from ulysses_core.parallel.trainer import sequence_parallel

    torch.manual_seed(0)
    config = small_config(kind, option)
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    attention = "eager" if has_softcap else None  # torch's SDPA has no soft cap
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide what they multiply
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = make_rows(rows)
    found: dict[str, Any] = {"losses": [], "gradients": {}}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if not found["gradients"]:
                found["gradients"] = {
                    name: p.grad.detach().clone()
                    for name, p in model.named_parameters()
                    if p.grad is not None
                }

    class Watched(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            found["losses"].append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=3,
            max_steps=2,
            learning_rate=_RATE,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=1e9,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            ddp_find_unused_parameters=True,
        )
        trainer = Watched(
            model,
            args,
            train_dataset=[{k: v[i] for k, v in batch.items()} for i in range(3)] * 2,
            callbacks=[Watch()],
        )
        if size > 1:
            sequence_parallel(trainer, size, check_family=False)
        with _Float64():
            trainer.train()
    found["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found

"""Trains small models of a family on whole rows and on slices, and compares the two.

Two steps of SGD in float64 on rows that are longer than every window of the model. The process is
one rank of a process group, or trains alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ulysses_core.parallel.families.small import VOCABULARY, small_config

__all__ = ["BOUNDS", "Errors", "Float64", "Variant", "measure", "train_variant"]

_LENGTHS = (41, 40, 37)
"""Tokens of the rows; the padding is shorter than every window, so no token sees only padding."""
_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One small model and the rows that it is trained on.

    Attributes:
        kind: the config class of the family.
        option: name and value of a setting; None for the family's default config.
        rows: `right` or `left` for the side of the padding, or `packed`.
        has_score: whether the head gives a number a row, as a reward model's, instead of logits.
        entries: settings of the user's own config.
    """

    kind: type[Any]
    option: tuple[str, Any] | None = None
    rows: str = "right"
    has_score: bool = False
    entries: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Errors:
    """How far a training on slices is from the same on whole rows; all relative.

    Attributes:
        loss: of the first loss.
        gradient: of the first step's gradients, the worst parameter.
        weight: of the weights after two steps, the worst parameter.
    """

    loss: float
    gradient: float
    weight: float

    @property
    def is_right(self) -> bool:
        """Whether all are within `BOUNDS`; NaN is not."""
        return all(
            error <= bound for error, bound in zip(*map(_values, (self, BOUNDS)), strict=True)
        )


def _values(errors: Errors) -> tuple[float, ...]:
    return errors.loss, errors.gradient, errors.weight


BOUNDS = Errors(loss=1e-9, gradient=1e-6, weight=1e-6)
"""Errors up to which a family counts as right."""


class Float64(TorchFunctionMode):
    """Computes in float64 what models compute in float32: norms, RoPE, softmax, the loss."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replaces float32 where it is an argument."""
        if func is Tensor.float:
            return args[0].double()
        given = {key: _widen(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **given)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def make_rows(kind: str) -> list[dict[str, Tensor]]:
    """Returns three rows of 41 tokens: padded on the right, on the left, or packed."""
    generator = torch.Generator().manual_seed(3)
    size = max(_LENGTHS)
    ids = torch.randint(2, VOCABULARY, (len(_LENGTHS), size), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    if kind == "packed":  # documents of 18 and 23 tokens
        at = torch.arange(size)
        batch["position_ids"] = torch.where(at < 18, at, at - 18).repeat(len(_LENGTHS), 1)
        labels[:, 18] = -100
    else:
        batch["attention_mask"] = mask = torch.ones_like(ids)
        for row, length in enumerate(_LENGTHS):
            hidden = slice(length, None) if kind == "right" else slice(0, size - length)
            mask[row, hidden], ids[row, hidden], labels[row, hidden] = 0, 0, -100
            if kind == "left":
                labels[row, size - length] = -100  # the first token, which nothing predicts
    return [{key: value[row] for key, value in batch.items()} for row in range(len(_LENGTHS))]


def build_small(variant: Variant) -> Any:
    """Builds the small model in float64; the same one in every process."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = small_config(variant.kind, variant.option, **variant.entries)
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    attention = "eager" if has_softcap else None  # torch's SDPA has no soft cap
    auto = AutoModelForSequenceClassification if variant.has_score else AutoModelForCausalLM
    config.num_labels = 1 if variant.has_score else config.num_labels
    model = auto.from_config(config, attn_implementation=attention).double()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide what they multiply
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def train_variant(variant: Variant, size: int) -> dict[str, Any]:
    """Trains a small model, its rows split over `size` ranks.

    Returns:
        `losses` of both steps, `gradients` of the first, and `weights` after the second.

    Raises:
        Exception: the family's code fails, in its own way.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback

    from ulysses_core.parallel.trainer import sequence_parallel

    model = build_small(variant)
    found: dict[str, Any] = {"losses": [], "gradients": {}}

    class Watch(TrainerCallback):
        """Keeps the gradients of the first step."""

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
            found["gradients"] = found["gradients"] or {n: g.detach().clone() for n, g in named}

    class Watched(Trainer):
        """Keeps its losses."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            found["losses"].append(float(loss.detach()))
            return loss

    rows = make_rows(variant.rows)
    if variant.has_score:
        rows = [row | {"labels": torch.tensor(0.5 * i)} for i, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder, Float64():
        trainer = Watched(
            model, make_arguments(folder), train_dataset=rows * 2, callbacks=[Watch()]
        )
        trainer.remove_callback(PrinterCallback)
        if size > 1:
            sequence_parallel(trainer, size, check_family=False)
        trainer.train()
    return found | {"weights": {n: p.detach().clone() for n, p in model.named_parameters()}}


def make_arguments(folder: str) -> Any:
    """Returns the training arguments of the two steps."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        per_device_train_batch_size=len(_LENGTHS),
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
        use_cache=False,
        ddp_find_unused_parameters=True,
    )


def measure(whole: Mapping[str, Any], split: Mapping[str, Any]) -> Errors:
    """Compares what `train_variant` returned for whole rows and for slices."""
    loss = float(whole["losses"][0])
    return Errors(
        abs(split["losses"][0] - loss) / abs(loss),
        _worst(whole["gradients"], split["gradients"]),
        _worst(whole["weights"], split["weights"]),
    )


def _worst(whole: Mapping[str, Tensor], split: Mapping[str, Tensor]) -> float:
    """Returns the worst error relative to a tensor's norm, or to a millionth of all together.

    A gradient that is zero but for rounding, as a key's bias has, thus does not count.
    """
    if whole.keys() != split.keys():
        return math.inf
    least = 1e-6 * math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in whole.values()))
    errors = [
        float((split[name] - tensor).norm()) / max(float(tensor.norm()), least)
        for name, tensor in whole.items()
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)

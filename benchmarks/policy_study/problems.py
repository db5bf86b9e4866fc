"""The models that are trained: a language model, an adapter on one, a deep net."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.policy_study.texts import SIDE, digits, rows_of, text_of

__all__ = ["PROBLEMS", "Problem", "held_out_loss"]

ROWS, LENGTH = 8, 64
"""Of a batch of text."""
PICTURES = 64
"""Of a batch of digits."""
EVALUATED = 16
"""Batches' worth of held-out rows."""
PRETRAINING_STEPS, PRETRAINING_RATE = 300, 5e-3
"""Of the model that gets an adapter."""


@dataclass(frozen=True)
class Problem:
    """A model and its data.

    Attributes:
        model: what is trained.
        loss: the model's mean loss on rows of whole numbers [B, T].
        batch: the rows of a step.
        held_out: rows to evaluate on, the same for every seed.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor], Tensor]
    batch: Callable[[torch.Generator], Tensor]
    held_out: Tensor


@torch.no_grad()
def held_out_loss(problem: Problem) -> float:
    """Computes the loss on held-out rows."""
    return float(problem.loss(problem.model, problem.held_out))


def language(seed: int, folder: Path) -> Problem:
    """Builds a small Llama that learns to write docstrings from scratch."""
    torch.manual_seed(seed)
    return _writing(_llama(), "docstrings", folder)


def adapter(seed: int, folder: Path) -> Problem:
    """Builds LoRA on such a model, trained on docstrings, that learns to write source code."""
    from peft import LoraConfig, get_peft_model

    model = _pretrained(seed, folder)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return _writing(model, "source", folder)


def deep(seed: int, folder: Path, *, gain: float) -> Problem:
    """Builds twelve tanh layers that learn to read digits.

    Args:
        seed: of the initialization.
        folder: not needed.
        gain: weights begin with a standard deviation of it over the root of a layer's inputs: a
            bit more than 1 carries signals through, less loses about that factor a layer.
    """
    del folder
    torch.manual_seed(seed)
    held_out = digits(EVALUATED * PICTURES, torch.Generator().manual_seed(1 << 40))
    return Problem(_tanh_net(gain), _reading_loss, partial(digits, PICTURES), held_out)


PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    "adapter": adapter,
    "deep": deep,
    "language": language,
}
"""By name: made of a seed, a folder that keeps what trainings share, and settings."""


def _writing(model: nn.Module, text: str, folder: Path) -> Problem:
    evaluated = text_of(text, True, folder)
    held_out = rows_of(evaluated, EVALUATED * ROWS, LENGTH, torch.Generator().manual_seed(0))
    batch = partial(rows_of, text_of(text, False, folder), ROWS, LENGTH)
    return Problem(model, _writing_loss, batch, held_out)


def _writing_loss(model: nn.Module, rows: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def _reading_loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1] / 256), rows[:, -1])


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _tanh_net(gain: float, width: int = 64, depth: int = 12) -> nn.Module:
    sizes = [SIDE * SIDE, *[width] * depth]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    layers.append(nn.Linear(width, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _pretrained(seed: int, folder: Path) -> nn.Module:
    """Loads a model trained on docstrings; trains it first if the folder lacks its weights."""
    path = folder / f"pretrained-{seed}.pt"
    if not path.exists():
        problem = language(seed, folder)
        _pretrain(problem, torch.Generator().manual_seed(seed))
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(problem.model.state_dict(), part)
        part.replace(path)
    model = _llama()
    model.load_state_dict(torch.load(path))
    return model


def _pretrain(problem: Problem, generator: torch.Generator) -> None:
    params = list(problem.model.parameters())
    optimizer = torch.optim.AdamW(params, PRETRAINING_RATE)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    scheduler = cycle(optimizer, PRETRAINING_RATE, total_steps=PRETRAINING_STEPS, pct_start=0.1)
    for _ in range(PRETRAINING_STEPS):
        problem.loss(problem.model, problem.batch(generator)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

"""The trainings of the study: each is small, seeded, and named after its condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

__all__ = ["TASKS", "Poison", "Task"]


@dataclass(frozen=True, kw_only=True)
class Poison:
    """Corrupted rows: bursts of batches of random bytes whose loss is far too large."""

    bursts: int = 3
    longest: int = 3
    """Most steps of a burst; the fewest is 1."""
    after: int = 80
    """First steps, which are never hit."""
    factor: float = 50.0
    """Factor on the loss, like that of a loss that sums where it should average."""

    def steps(self, seed: int, total: int) -> dict[int, float]:
        """Draws the factors of the steps that are hit: a burst in each equal part of a training."""
        generator = torch.Generator().manual_seed(1_000_003 + seed)
        part = (total - self.after) // self.bursts
        hit: dict[int, float] = {}
        for burst in range(self.bursts):
            offset = int(torch.randint(0, part - self.longest, (), generator=generator))
            length = int(torch.randint(1, self.longest + 1, (), generator=generator))
            first = self.after + 1 + burst * part + offset
            hit |= dict.fromkeys(range(first, first + length), self.factor)
        return hit


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training."""

    name: str
    about: str
    """A sentence for people."""
    problem: str
    """A name in `problems.PROBLEMS`."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Of the problem."""
    optimizer: Literal["adamw", "sgd"]
    """With PyTorch's defaults; ``sgd`` has a momentum of 0.9."""
    lr: float
    """The peak, after a linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up; ``cosine`` ends at 0."""
    warmup: int = 20
    steps: int = 250
    clip: float | None = 1.0
    """The norm to which the loop itself clips gradients."""
    poison: Poison | None = None
    sound: Mapping[str, Any] = field(default_factory=dict)
    """Fields in which the same training without its trouble differs; empty if it has none."""

    def without_trouble(self) -> Task:
        """Returns the training that shows what the trouble costs."""
        return replace(self, **{**self.sound, "sound": {}})


def _tasks(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


TASKS: Mapping[str, Task] = _tasks(
    Task(
        name="healthy-adamw",
        about="A small Llama learns to write docstrings, at a tuned rate.",
        problem="language",
        optimizer="adamw",
        lr=2e-3,
    ),
    Task(
        name="healthy-sgd",
        about="The same with SGD, at its own tuned rate.",
        problem="language",
        optimizer="sgd",
        lr=0.1,
    ),
    Task(
        name="healthy-lora",
        about="LoRA on a Llama that writes docstrings learns source code, at a tuned rate.",
        problem="adapter",
        optimizer="adamw",
        lr=1e-2,
        steps=200,
    ),
    Task(
        name="vanishing-sgd",
        about="Twelve tanh layers whose weights begin too small (gain 0.6) learn to read digits.",
        problem="deep",
        settings={"gain": 0.6},
        optimizer="sgd",
        lr=0.1,
        steps=400,
        sound={"settings": {"gain": 1.4}},
    ),
    Task(
        name="vanishing-adamw",
        about="Twelve tanh layers whose weights begin far too small (gain 0.1) learn the same.",
        problem="deep",
        settings={"gain": 0.1},
        optimizer="adamw",
        lr=3e-3,
        steps=400,
        sound={"settings": {"gain": 1.4}},
    ),
    Task(
        name="spikes-poisoned-adamw",
        about="The healthy Llama, with three bursts of random bytes at 50 times the loss.",
        problem="language",
        optimizer="adamw",
        lr=2e-3,
        clip=None,
        poison=Poison(),
        sound={"poison": None},
    ),
    Task(
        name="spikes-poisoned-sgd",
        about="The same with SGD, at a rate tuned without clipping.",
        problem="language",
        optimizer="sgd",
        lr=0.02,
        clip=None,
        poison=Poison(),
        sound={"poison": None},
    ),
    Task(
        name="spikes-high-lr-adamw",
        about="The healthy Llama at 20 times its tuned rate: gradients spike, nothing diverges.",
        problem="language",
        optimizer="adamw",
        lr=4e-2,
        clip=None,
        sound={"lr": 2e-3},
    ),
    Task(
        name="spikes-high-lr-sgd",
        about="Twelve tanh layers that begin right, at three times their rate: they learn, and "
        "lose it again.",
        problem="deep",
        settings={"gain": 1.4},
        optimizer="sgd",
        lr=0.3,
        steps=400,
        clip=None,
        sound={"lr": 0.1, "clip": 1.0},
    ),
    Task(
        name="spikes-high-lr-lora",
        about="The healthy LoRA at four times its tuned rate, which loses all it had learnt.",
        problem="adapter",
        optimizer="adamw",
        lr=4e-2,
        steps=200,
        sound={"lr": 1e-2},
    ),
    Task(
        name="lora-low-lr",
        about="The healthy LoRA at a tenth of its tuned rate.",
        problem="adapter",
        optimizer="adamw",
        lr=1e-3,
        steps=200,
        sound={"lr": 1e-2},
    ),
    Task(
        name="lora-high-lr",
        about="The healthy LoRA at three times its tuned rate.",
        problem="adapter",
        optimizer="adamw",
        lr=3e-2,
        steps=200,
        sound={"lr": 1e-2},
    ),
    Task(
        name="late-oscillation-sgd",
        about="Twelve tanh layers learn to read digits, at twice their tuned rate, never lowered.",
        problem="deep",
        settings={"gain": 1.4},
        optimizer="sgd",
        lr=0.2,
        schedule="constant",
        steps=400,
        sound={"schedule": "cosine"},
    ),
)
"""By name."""

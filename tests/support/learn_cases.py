"""Preference stages on a taste that a tiny model can learn: answers of low words are liked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.support.forget import forget_last_trainer
from tests.support.parity_cases import ParityCase, build, write_rows
from tests.support.sequence_cases import VOCAB

__all__ = ["KINDS", "learn", "write_taste"]

KINDS = {
    "rm": "accuracy",
    "dpo": "rewards/margins",
    "dpo-orpo": "rewards/margins",
    "dpo-simpo": "rewards/margins",
    "kto": "rewards/margins",
}
"""Kinds of training, and the number of an evaluation that shows what was learnt.

KTO's margin is its desirability gap: the mean reward of liked answers less that of others.
"""
PAIRS, HELD_OUT = 80, 16


def write_taste(folder: Path) -> None:
    """Writes data sets of random prompts with a liked and a disliked answer."""
    write_rows(folder)
    draw = random.Random(0)
    half = VOCAB // 2

    def answer(low: int, high: int) -> str:
        return " " + " ".join(f"w{draw.randrange(low, high)}" for _ in range(draw.randint(4, 8)))

    pairs = [
        {
            "instruction": answer(2, VOCAB).strip(),
            "chosen": answer(2, half),
            "rejected": answer(half, VOCAB),
        }
        for _ in range(PAIRS)
    ]
    tagged = [
        {"instruction": pair["instruction"], "output": pair[side], "tag": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "tagged.json").write_text(json.dumps(tagged))


def learn(folder: str, seeds: list[int]) -> dict[str, list[list[float]]]:
    """The child: for each kind and seed, the number held out before and after 30 steps."""
    found: dict[str, list[list[float]]] = {}
    for kind, name in KINDS.items():
        for seed in seeds:
            found.setdefault(kind, []).append(learn_one(folder, kind, name, seed))
    return found


def learn_one(folder: str, kind: str, name: str, seed: int) -> list[float]:
    trainer: Any = build(
        ParityCase(kind=kind, size=1),
        folder,
        model_seed=10 * seed,
        seed=seed,
        val_size=2 * HELD_OUT if kind == "kto" else HELD_OUT,
        optim="adamw_torch",
        learning_rate=2e-3,
        max_steps=30,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential" if kind == "kto" else "random",
        eval_on_start=False,
    )
    before = trainer.evaluate()[f"eval_{name}"]
    trainer.train()
    after = trainer.evaluate()[f"eval_{name}"]
    forget_last_trainer()
    return [float(before), float(after)]

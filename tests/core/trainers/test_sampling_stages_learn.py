"""Stages grpo and ppo learn a toy task, to answer with small words, with each of three seeds."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.forget import forget_last_trainer
from tests.support.spawn import spawn
from tests.support.stage_cases import (
    StageCase,
    build_ppo_trainer,
    build_stage_trainer,
    reward_small_words,
)
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.integrations.rewards import bimodality

SEEDS = (1, 2, 3)
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"max_steps": 24, "beta": 0.0, "num_generations": 4},
    "ppo": {"max_steps": 64},
}
TWO_GROUPS = [i / 100 + (i > 7) for i in range(16)]
NUMBERS: dict[str, Any] = {"init_kl_coef": 0.02, "target": None, "cliprange": 0.2}
NUMBERS |= {"cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95}
NUMBERS |= {"score_norm": False, "whiten_rewards": False}


def train_rewards(stage: str, seed: int) -> list[float]:
    """Returns the share of small words in the first and in the last quarter of the answers."""
    settings = SETTINGS[stage] | {"seed": seed, "optim": "adamw_torch", "learning_rate": 0.01}
    case = StageCase(stage=stage, rows=12, settings=tuple(settings.items()))
    if stage == "ppo":
        trainer = build_ppo_trainer(case, [reward_small_words], **NUMBERS)
    else:
        trainer = build_stage_trainer(case)
    trainer.train()
    name = "rewards/reward_small_words/mean"
    rewards = [entry[name] for entry in trainer.state.log_history if name in entry]
    forget_last_trainer()
    quarter = len(rewards) // 4
    return [mean(rewards[:quarter]), mean(rewards[-quarter:])]


def note_shape(scores: list[float]) -> list[float]:
    """Returns what PPO notes of the shape of such scores."""
    trainer = build_ppo_trainer(StageCase(stage="ppo", rows=12), [reward_small_words], **NUMBERS)
    trainer._calculate_rewards = lambda *_: torch.tensor(scores)[:, None]
    trainer._score(None, None, [""] * len(scores), [], {})
    return list(trainer._metrics[trainer.mode]["reward_bimodality"])


def note_shapes() -> list[list[float]]:
    """The child."""
    return [note_shape(scores) for scores in (TWO_GROUPS, [0.0, 1.0] * 8)]


def train_all() -> dict[str, list[list[float]]]:
    """The child."""
    return {stage: [train_rewards(stage, seed) for seed in SEEDS] for stage in SETTINGS}


def train_with_too_few_prompts() -> str:
    try:
        build_stage_trainer(StageCase(stage="ppo", rows=16, adapters=True)).train()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.timeout(400)
def test_the_reward_rises_with_every_seed() -> None:
    [found] = spawn(train_all, 1, timeout=300)
    for stage, rewards in found.items():
        gains = [last - first for first, last in rewards]
        assert min(gains) > 0.15, (stage, rewards)
        assert mean(gains) - 2 * stdev(gains) > 0, (stage, rewards)


def test_fewer_prompts_than_are_answered_at_a_time_are_refused() -> None:
    [message] = spawn(train_with_too_few_prompts, 1, timeout=120)
    assert message.startswith(
        "the dataset has 12 prompts; expected at least 16, which are answered"
    )


def test_ppo_notes_whether_the_rewards_of_its_answers_are_two_groups() -> None:
    [(groups, right_or_wrong)] = spawn(note_shapes, 1, timeout=120)
    assert groups == pytest.approx([bimodality(np.array(TWO_GROUPS))], rel=1e-4)
    assert groups[0] > 0.65
    assert right_or_wrong == []

"""`train/reward_bimodality/total`: whether the rewards of a batch of answers are two groups."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ulysses_monitor.integrations.rewards import bimodality, describe_rewards

NAME = "train/reward_bimodality/total"


def test_known_distributions_have_the_coefficients_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    assert bimodality(draw.normal(size=100_000)) == pytest.approx(1 / 3, abs=0.01)
    assert bimodality(draw.uniform(size=100_000)) == pytest.approx(5 / 9, abs=0.01)
    groups = np.concatenate([draw.normal(-4, 1, 5_000), draw.normal(4, 1, 5_000)])
    # Of two groups at +-d: 1 / ((d^4 + 6 d^2 + 3) / (d^2 + 1)^2).
    assert bimodality(groups) == pytest.approx(289 / 355, abs=0.02)


def test_the_estimators_are_the_unbiased_ones() -> None:
    values = np.arange(16.0)
    # By hand: g1 = 0, m4 / m2^2 = 3 (3 n^2 - 7) / (5 (n^2 - 1)).
    excess = 3 * (3 * 256 - 7) / (5 * 255) - 3
    kurtosis = 15 / (14 * 13) * (17 * excess + 6)
    assert bimodality(values) == pytest.approx(1 / (kurtosis + 3 * 225 / (14 * 13)))


@pytest.mark.parametrize("values", [np.arange(15.0), np.ones(32), np.arange(32.0) % 4])
def test_few_answers_and_few_different_rewards_say_nothing(values: np.ndarray) -> None:
    assert bimodality(values) is None


def trainer(**rewards: list[float]) -> SimpleNamespace:
    kept = {name: deque(scores) for name, scores in rewards.items()}
    weights = torch.arange(1.0, 1.0 + len(kept))
    return SimpleNamespace(_logs={"rewards": kept}, reward_weights=weights)


def test_rewards_of_the_functions_are_weighted_and_answers_that_none_scored_left_out() -> None:
    draw = np.random.default_rng(1)
    first, second = draw.normal(size=32), draw.normal(size=32)
    given = trainer(a=[*first, np.nan], b=[*second, np.nan])
    expected = bimodality(first + 2 * second)
    assert describe_rewards(given, {"reward": 0.5}) == {NAME: pytest.approx(expected)}


def test_an_evaluation_and_other_trainers_say_nothing() -> None:
    given = trainer(a=list(np.random.default_rng(1).normal(size=32)))
    assert describe_rewards(given, {"eval_reward": 0.5}) == {}
    assert describe_rewards(trainer(), {"reward": 0.5}) == {}
    assert describe_rewards(SimpleNamespace(), {"reward": 0.5}) == {}

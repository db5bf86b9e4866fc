"""PPO's mathematics against direct computations from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ulysses_core.trainers.ppo.algorithm import (
    KlController,
    RunningMoments,
    estimate_advantages,
    explain_variance,
    policy_losses,
    reward_tokens,
    value_losses,
    whiten,
)

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
LENGTHS = MASK.sum(dim=1).tolist()


def noise(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MASK.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_the_weighted_sum_of_temporal_differences(gamma: float, lam: float) -> None:
    rewards, values = noise(0), noise(1)
    found = estimate_advantages(rewards, values, MASK, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        following = [*values[row, 1:length].tolist(), 0.0]
        deltas = [
            float(rewards[row, t]) + gamma * following[t] - float(values[row, t])
            for t in range(length)
        ]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            assert float(found[row, t]) == pytest.approx(expected, rel=1e-12)
        assert not found[row, length:].any()


def test_with_lambda_1_an_advantage_is_the_return_less_the_value() -> None:
    rewards, values = noise(0) * MASK, noise(1) * MASK
    returns = rewards.flip(1).cumsum(1).flip(1) * MASK
    found = estimate_advantages(rewards, values, MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(found, returns - values)


def test_the_last_token_gets_the_score_and_each_pays_for_its_divergence() -> None:
    divergence, scores = noise(0), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    rewards = reward_tokens(scores, divergence, MASK, 0.3)
    expected = -0.3 * divergence * MASK
    for row, length in enumerate(LENGTHS):
        if length:
            expected[row, length - 1] += scores[row]
    torch.testing.assert_close(rewards, expected)


def test_the_policy_loss_is_the_smaller_objective_with_the_sign_turned() -> None:
    log_ratio, advantages = noise(0) * 0.3, noise(1)
    losses, is_clipped = policy_losses(log_ratio, advantages, 0.2)
    for loss, clipped, each, advantage in zip(
        losses.flatten().tolist(),
        is_clipped.flatten().tolist(),
        log_ratio.flatten().tolist(),
        advantages.flatten().tolist(),
        strict=True,
    ):
        ratio = math.exp(each)
        objective = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        assert loss == pytest.approx(-objective, rel=1e-12)
        assert clipped == (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)


def test_a_clipped_token_has_no_gradient() -> None:
    log_ratio = torch.tensor([[0.5, 0.5]], requires_grad=True)
    losses, is_clipped = policy_losses(log_ratio, torch.tensor([[1.0, -1.0]]), 0.2)
    losses.sum().backward()
    assert is_clipped.tolist() == [[True, False]]
    assert log_ratio.grad is not None
    assert log_ratio.grad[0].tolist() == pytest.approx([0.0, math.exp(0.5)])


def test_the_value_loss_is_the_larger_squared_error() -> None:
    values, old, returns = noise(0), noise(1), noise(2)
    losses = value_losses(values, old, returns, 0.2)
    for loss, value, before, wanted in zip(
        *(each.flatten().tolist() for each in (losses, values, old, returns)), strict=True
    ):
        clipped = min(max(value, before - 0.2), before + 0.2)
        assert loss == pytest.approx(0.5 * max((value - wanted) ** 2, (clipped - wanted) ** 2))


def test_whitened_values_have_mean_0_and_deviation_1() -> None:
    values = noise(0) * 3 + 2
    found = whiten(values, values.mean(), values.var(correction=0))
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(found.std(correction=0)) == pytest.approx(1.0, rel=1e-6)
    kept = whiten(values, values.mean(), values.var(correction=0), shift=False)
    assert float(kept.mean()) == pytest.approx(float(values.mean()))


def test_the_controller_moves_towards_the_target_by_at_most_a_fifth() -> None:
    control = KlController(0.2, target=6.0, horizon=100.0)
    control.update(6.6, answers=10)
    assert control.coefficient == pytest.approx(0.2 * (1 + 0.1 * 10 / 100))
    control.update(60.0, answers=10)
    assert control.coefficient == pytest.approx(0.2 * 1.01 * 1.02)
    control.update(0.0, answers=10)
    assert control.coefficient == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    fixed = KlController(0.2, target=None, horizon=100.0)
    fixed.update(60.0, answers=10)
    assert fixed.coefficient == 0.2


def test_running_moments_are_those_of_all_scores() -> None:
    scores = noise(0).flatten()
    moments = RunningMoments()
    for part in scores.split([7, 9, 4]):
        moments.update(float(part.mean()), float(part.var(correction=0)), len(part))
    assert moments.mean == pytest.approx(float(scores.mean()))
    assert moments.variance == pytest.approx(float(scores.var(correction=0)))
    normal = moments.normalise(scores)
    assert float(normal.std(correction=0)) == pytest.approx(1.0, rel=1e-6)


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant() -> None:
    assert explain_variance(0.0, 2.0) == 1.0
    assert explain_variance(2.0, 2.0) == 0.0
    assert explain_variance(0.0, 0.0) == 0.0

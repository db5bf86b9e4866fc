"""The mathematics of PPO on whole answers, without models and processes.

Legend: B answers, T tokens of an answer (padded on the right). `mask` [B, T] is 1 where an answer
has a token. The state before token t is the prompt and the tokens before t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "KlController",
    "RunningMoments",
    "estimate_advantages",
    "explain_variance",
    "policy_losses",
    "reward_tokens",
    "value_losses",
    "whiten",
]


def reward_tokens(scores: Tensor, divergence: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Returns the reward of each token [B, T]: its divergence costs, the last one gets the score.

    Stiennon et al., arXiv 2009.01325, equation 2, applied token by token.

    Args:
        scores: of each answer [B].
        divergence: log-probability of each token minus the reference model's [B, T].
        mask: see the module.
        coefficient: cost of the divergence.
    """
    rewards = -coefficient * divergence * mask
    last = mask.sum(dim=1).long() - 1
    has_token = last >= 0
    rows = torch.arange(len(scores), device=scores.device)[has_token]
    rewards[rows, last[has_token]] += scores[has_token].to(rewards.dtype)
    return rewards


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Returns generalised advantage estimates [B, T]; 0 where an answer has no token.

    Schulman et al., arXiv 1506.02438, equations 11 and 16:
    delta_t = r_t + gamma V(t + 1) - V(t), A_t = delta_t + gamma lam A_(t + 1). After the last token
    of an answer the value and the advantage are 0.

    Args:
        rewards: of each token [B, T].
        values: of the state before each token [B, T].
        mask: see the module.
        gamma: discount.
        lam: weight of longer estimates, 1 for the whole answer.
    """
    later_value = later = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for step in reversed(range(values.shape[1])):
        present = mask[:, step].to(values.dtype)
        delta = rewards[:, step] + gamma * later_value - values[:, step]
        later = (delta + gamma * lam * later) * present
        later_value = values[:, step] * present
        advantages[:, step] = later
    return advantages


def policy_losses(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Returns the clipped loss of each token [B, T], and which ones are clipped, bool [B, T].

    Schulman et al., arXiv 1707.06347, equation 7, with the sign turned.

    Args:
        log_ratio: log-probability of each token minus that at sampling time [B, T].
        advantages: of each token [B, T].
        clip: how far the ratio may leave 1.
    """
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Returns half the squared error of each value, at least that of the clipped value [B, T].

    As in the authors' implementation (arXiv 2005.12729, section 3): a value may leave the one at
    sampling time, `old`, by at most `clip`.
    """
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def whiten(values: Tensor, mean: Tensor, variance: Tensor, *, shift: bool = True) -> Tensor:
    """Returns values with standard deviation 1, and mean 0 unless `shift` is false."""
    centred = (values - mean) * (variance + 1e-8).rsqrt()
    return centred if shift else centred + mean


def explain_variance(residual: float, total: float) -> float:
    """Returns 1 - Var(returns - values) / Var(returns): 1 for perfect values, 0 for a constant."""
    return 1.0 - residual / total if total > 0 else 0.0


@dataclass
class KlController:
    """The cost of the divergence from the reference model.

    With a target it follows Ziegler et al., arXiv 1909.08593, section 2.2: for each batch it is
    multiplied by 1 + error * answers / horizon, error = clip(divergence / target - 1, -0.2, 0.2).
    """

    coefficient: float
    target: float | None
    """Divergence of an answer to hold, in nats; None leaves the coefficient as it is."""
    horizon: float

    def update(self, divergence: float, answers: int) -> None:
        """Adapts the coefficient to the mean divergence of a batch of answers."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * answers / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far, merged by Chan et al. (1979)."""

    mean: float = 0.0
    variance: float = 1.0
    count: float = 1e-24

    def update(self, mean: float, variance: float, count: int) -> None:
        """Adds a batch of scores."""
        total = self.count + count
        delta = mean - self.mean
        moments = variance * count + self.variance * self.count
        moments += delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.variance, self.count = moments / total, total

    def normalise(self, scores: Tensor) -> Tensor:
        """Returns scores less the mean, over the standard deviation."""
        return (scores - self.mean) / math.sqrt(self.variance + 1e-8)

"""The rewards of single answers, which TRL's GRPO and RLOO Trainers keep of their last batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["bimodality", "describe_rewards"]

_LEAST = 16
"""Answers that there must be."""
_DISTINCT = 5
"""Different rewards that there must be: two values are two groups whatever they mean."""


def describe_rewards(trainer: Any, logs: Mapping[str, Any]) -> dict[str, float]:
    """Returns the bimodality of the rewards of the answers that a Trainer scored last.

    Args:
        trainer: the Trainer; other Trainers than those of answers give nothing.
        logs: what it logs: of training, not of an evaluation.
    """
    kept = getattr(trainer, "_logs", None)
    by_function = kept.get("rewards") if isinstance(kept, Mapping) else None
    weights = getattr(trainer, "reward_weights", None)
    if "reward" not in logs or not by_function or weights is None:
        return {}
    scores = np.array([list(scores) for scores in by_function.values()], np.float64)
    scores = scores[:, np.isfinite(scores).any(axis=0)]
    rewards = np.nansum(scores * np.array(weights.tolist())[:, None], axis=0)
    found = bimodality(rewards)
    return {} if found is None else {"train/reward_bimodality/total": found}


def bimodality(values: npt.NDArray[np.float64]) -> float | None:
    """Returns the bimodality coefficient; 5/9 for a uniform distribution, 1/3 for a normal one.

    (skewness^2 + 1) / (excess kurtosis + 3 (n-1)^2 / ((n-2)(n-3))), with the unbiased estimators of
    both (SAS Institute; Pfister et al. 2013, doi:10.3389/fpsyg.2013.00700).

    Args:
        values: the values [N].

    Returns:
        The coefficient; None if there are fewer than 16 values, or fewer than 5 different ones.
    """
    count = len(values)
    if count < _LEAST or len(np.unique(values)) < _DISTINCT:
        return None
    away = values - values.mean()
    second, third, fourth = (float((away**k).mean()) for k in (2, 3, 4))
    if not second > 0:
        return None
    skewness = third / second**1.5 * np.sqrt(count * (count - 1)) / (count - 2)
    excess = fourth / second**2 - 3
    factor = (count - 1) / ((count - 2) * (count - 3))
    kurtosis = factor * ((count + 1) * excess + 6)
    correction = 3 * (count - 1) ** 2 / ((count - 2) * (count - 3))
    return float((skewness**2 + 1) / (kurtosis + correction))

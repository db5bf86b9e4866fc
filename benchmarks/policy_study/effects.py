"""What the differences over seeds show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Effect", "Verdict", "paired_effect", "t_quantile", "verdict"]

Verdict = Literal["helps", "hurts", "no effect seen", "nothing"]

# 97.5 % of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Effect:
    """The mean of paired differences and its 95 % interval; infinite with one seed."""

    mean: float
    low: float
    high: float
    seeds: int


def t_quantile(degrees: int) -> float:
    """Returns Student's t at 97.5 %; above 30 degrees that of 30, which is a little too wide."""
    return _T[min(degrees, len(_T)) - 1]


def paired_effect(differences: Sequence[float]) -> Effect:
    """Computes the paired t interval of differences, one a seed."""
    count, mean = len(differences), statistics.fmean(differences)
    half = math.inf
    if count > 1:
        half = t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Effect(mean, mean - half, mean + half, count)


def verdict(effect: Effect, *, acted: bool) -> Verdict:
    """Names an effect on a loss in a word.

    Args:
        effect: of it.
        acted: whether anything was done in any seed.
    """
    if not acted:
        return "nothing"
    if effect.high < 0:
        return "helps"
    return "hurts" if effect.low > 0 else "no effect seen"

"""The range of a metric over the LoRA modules, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["Band", "build_band"]

_POINTS = 800
"""Smoothed points to draw, about."""


@dataclass(frozen=True)
class Band:
    """The 10th to the 90th percentile of the modules.

    Attributes:
        low: the 10th percentile, smoothed and thinned out, by step.
        high: the 90th percentile, likewise.
        modules: number of modules.
    """

    low: pd.Series[float]
    high: pd.Series[float]
    modules: int


def build_band(frames: Iterable[pd.DataFrame]) -> Band | None:
    """Builds the band of positive finite values; None for fewer than two modules.

    Args:
        frames: consecutive steps, with a column for each module.
    """
    ends: list[pd.DataFrame] = []
    count = 0
    for frame in frames:
        count = frame.shape[1]
        positive = frame.where(np.isfinite(frame) & (frame > 0)).dropna(how="all")
        if count > 1 and len(positive):
            ends.append(positive.quantile([0.1, 0.9], axis=1).T)
    if not ends:
        return None
    both = pd.concat(ends)
    every = max(1, len(both) // _POINTS)
    low, high = (both[q].rolling(every, min_periods=1).median().iloc[::every] for q in (0.1, 0.9))
    return Band(low, high, count)

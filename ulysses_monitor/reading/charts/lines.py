"""Lines and marks over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ulysses_monitor.reading.charts.style import MIN_SMOOTHED, RED

__all__ = ["draw_line", "mark_alerts", "mark_steps", "thin_out", "with_holes"]

Series = pd.Series  # of float, indexed by step


def thin_out(series: Series, limit: int = 1600) -> Series:
    """Returns at most `limit` points, with the minimum and the maximum of each stretch."""
    if len(series) <= limit:
        return series
    stretch = np.arange(len(series)) * (limit // 2) // len(series)
    groups = series.groupby(stretch)
    return series.loc[sorted({*groups.idxmin(), *groups.idxmax()})]


_MAX_SMOOTHED_PARTS = 100
"""A line in more parts is not smoothed: little would be left of each."""


def with_holes(series: Series, limit: int = 1600) -> Series:
    """Returns at most `limit` finite points, with a NaN in each hole, which interrupts a line.

    Args:
        series: infinite or NaN where a value was measured and is not finite.
        limit: of `thin_out`.
    """
    is_broken = ~np.isfinite(series.to_numpy())
    if not is_broken.any():
        return thin_out(series, limit)
    holes = series[is_broken & ~np.append(False, is_broken[:-1])] * np.nan
    drawn: Series = pd.concat([thin_out(series[~is_broken], limit), holes])
    return drawn.sort_index()


def _find_lone_points(series: Series) -> Series:
    """Returns the finite values between two holes, or a hole and an end: no line shows these."""
    is_broken = ~np.isfinite(series.to_numpy())
    lone = ~is_broken & np.append(True, is_broken[:-1]) & np.append(is_broken[1:], True)
    found: Series = series[lone]
    return found


def _smooth(series: Series) -> Series:
    """Returns the moving average, which begins again after each value that is not finite."""
    is_finite = np.isfinite(series.to_numpy())
    parts = np.cumsum(~is_finite)
    span = max(5, int(is_finite.sum()) // 50)
    if not parts[-1]:
        return series.ewm(span=span).mean()
    averages = series.where(is_finite).groupby(parts).transform(lambda s: s.ewm(span=span).mean())
    return averages.where(is_finite)


def draw_line(
    ax: Axes, series: Series, color: str, label: str | None = None, *, smooth: bool = True
) -> None:
    """Draws a series as a light line under its exponential moving average.

    A series that is short, or not to be smoothed, is drawn as one line. A value that is not finite
    is a hole in either line.
    """
    holes = int((~np.isfinite(series)).sum())
    if holes and len(lone := thin_out(_find_lone_points(series))):
        ax.plot(lone.index, lone, color=color, linestyle="none", marker=".", markersize=3)
    if len(series) < MIN_SMOOTHED or not smooth or holes > _MAX_SMOOTHED_PARTS:
        marker = {"marker": "o", "markersize": 3.2} if len(series) < 13 else {}
        line: dict[str, Any] = {"color": color, "linewidth": 1.3, "label": label, **marker}
        series = with_holes(series)
        ax.plot(series.index, series, **line)
        return
    raw = with_holes(series)
    ax.plot(raw.index, raw, color=color, linewidth=0.6, alpha=0.45)
    average = with_holes(_smooth(series), 800)
    ax.plot(average.index, average, color=color, linewidth=1.5, label=label)


def mark_steps(ax: Axes, steps: Sequence[int], color: str, label: str, row: int = 0) -> None:
    """Marks `steps` in a strip along the bottom; consecutive steps share one bar.

    Args:
        ax: the axes, whose step limits are set.
        steps: the steps to mark.
        color: of the bars.
        label: for the legend.
        row: of the strip, from the bottom: strips in the same axes do not overlap.
    """
    if not len(steps):
        return
    low, high = ax.get_xlim()
    bars = _find_bars(steps, min_width=(high - low) / 300)  # one step in thousands must be visible
    span = (0.012 + 0.035 * row, 0.025)
    ax.broken_barh(
        bars, span, transform=ax.get_xaxis_transform(), color=color, label=label, linewidth=0
    )


def _find_bars(steps: Sequence[int], min_width: float) -> list[tuple[float, float]]:
    """Returns the begin and the width of each bar: one for each run of consecutive steps."""
    ordered = np.unique(np.asarray(steps))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > max(1.0, min_width)) + 1)
    return [(float(r[0]) - 0.5, max(float(r[-1] - r[0]) + 1, min_width)) for r in runs]


def mark_alerts(ax: Axes, steps: Sequence[int]) -> None:
    """Marks the first 200 of `steps` with small red triangles along the top."""
    if len(steps):
        shown = np.unique(np.asarray(steps))[:200]
        ax.plot(
            shown,
            np.full(len(shown), 0.97),
            linestyle="none",
            marker="v",
            markersize=4.5,
            color=RED,
            markeredgewidth=0,
            label="alert",
            clip_on=False,
            transform=ax.get_xaxis_transform(),
        )

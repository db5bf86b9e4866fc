"""Figures and axes: layout, titles, legends, scales, colour bars."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ulysses_monitor.common.formatting import tick
from ulysses_monitor.reading.charts.style import (
    FONT_SIZE,
    FULL_WIDTH,
    INK,
    MUTED,
    RULE,
    TICK_STEPS,
    escape_math,
)

__all__ = [
    "add_color_bar",
    "add_legend",
    "choose_y_scale",
    "fit_step_axis",
    "set_log_scale",
    "set_title",
    "stack_axes",
]

Series = pd.Series  # of float, indexed by step

_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 0.46, 0.2, 0.34, 0.4, 0.34  # inches
_CHARACTER_WIDTH = 0.068  # on average, in inches


def stack_axes(
    *heights: float, width: float = FULL_WIDTH, margin: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Creates a figure with axes on top of each other that share their step axis.

    Args:
        heights: of the axes, from top to bottom, in inches.
        width: of the figure, in inches.
        margin: around the figure, in inches.
    """
    left, right = _LEFT + margin, _RIGHT + margin
    total = _TOP + sum(heights) + _GAP * (len(heights) - 1) + _BOTTOM + 2 * margin
    figure, axes, top = Figure(figsize=(width, total)), list[Axes](), total - _TOP - margin
    for height in heights:
        box = (left / width, (top - height) / total, 1 - (left + right) / width, height / total)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
        _style_axes(axes[-1])
        top -= height + _GAP
    _label_steps(axes)
    return figure, axes


def _label_steps(axes: Sequence[Axes]) -> None:
    """Labels the shared step axis, below the lowest axes only."""
    for upper in axes[:-1]:
        upper.tick_params(axis="x", labelbottom=False)
    axes[-1].set_xlabel("step", loc="right", fontsize=FONT_SIZE, color=MUTED, labelpad=2)


def _style_axes(ax: Axes) -> None:
    ax.set_facecolor("none")
    for side in ("top", "left", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set(color=MUTED, linewidth=0.6)
    ax.tick_params(labelsize=FONT_SIZE, labelcolor=MUTED, color=MUTED, width=0.6, length=3)
    ax.tick_params(axis="y", length=0, pad=4)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ticks = 10 if ax.get_position().width > 0.9 else 5
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=TICK_STEPS, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))


def set_title(ax: Axes, text: str) -> None:
    """Writes the y axis's name above it, where it reads upright, in line with the tick labels."""
    left = -_LEFT / _size_in_inches(ax)[0]
    # With its y given, matplotlib does not move the title above other artists, such as a bar.
    ax.set_title(text, loc="left", fontsize=FONT_SIZE, color=INK, pad=7, x=left, y=1.0)


def _size_in_inches(ax: Axes) -> tuple[float, float]:
    """Returns the width and the height of axes that `stack_axes` created."""
    width, height = ax.bbox.size / mpl.rcParams["figure.dpi"]
    return float(width), float(height)


def add_legend(ax: Axes) -> None:
    """Adds a row of labels above the axes, at the right, for the lines that have one."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.02),
            ncols=len(labels),
            fontsize=FONT_SIZE,
            labelcolor=MUTED,
            frameon=False,
            borderaxespad=0,
            borderpad=0.2,
            handlelength=1.3,
            columnspacing=1.4,
        )


def add_color_bar(ax: Axes, colors: Colormap, low: str, high: str, room: float = 0.0) -> None:
    """Adds a colour bar above the axes, at the right.

    Args:
        ax: the axes.
        colors: of the bar, from left to right.
        low: the label at its left.
        high: the label at its right.
        room: to leave free at the right, for a legend, in inches.
    """
    width, height = _size_in_inches(ax)
    right = 1 - (room + 0.1 + _CHARACTER_WIDTH * len(high)) / width
    bar = ax.inset_axes((right - 1.35 / width, 1 + 0.11 / height, 1.35 / width, 0.085 / height))
    bar.imshow(np.linspace(0, 1, 64)[None, :], cmap=colors, aspect="auto")
    bar.set_axis_off()
    for x, side, text in ((-0.04, "right", low), (1.04, "left", high)):
        bar.text(
            x,
            0.5,
            escape_math(text),
            ha=side,
            va="center_baseline",
            transform=bar.transAxes,
            fontsize=FONT_SIZE,
            color=MUTED,
        )


def set_log_scale(ax: Axes, values: Series) -> None:
    """Makes the y axis logarithmic, with limits that fit the positive `values`."""
    high = float(values.max())
    low = max(float(values[values > 0].min()), 1e-9 * high)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.4, high * 1.4)
    narrow = high / low < 50
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=7))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))


def choose_y_scale(ax: Axes, values: Series) -> None:
    """Makes the y axis logarithmic if `values` span more than a decade; else starts it at 0."""
    if values.min() >= 0 and values.max() > 10 * values[values > 0].min():
        set_log_scale(ax, values)
    else:
        ax.set_ylim(bottom=min(0.0, float(values.min())))


def fit_step_axis(ax: Axes, steps: pd.Index[int]) -> None:
    """Fits the step axis to all of a run's `steps`, so that it is the same in every chart."""
    ax.set_xlim(float(steps.min()) - 0.5, float(steps.max()) + 0.5)

"""The look of every chart, and SVG that follows the page's light or dark theme.

The object API of matplotlib only: nothing here touches pyplot or leaves a changed rcParam behind.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ulysses_monitor.report.formatting import tick

__all__ = [
    "BLUE",
    "HALF",
    "INK",
    "MUTED",
    "ORANGE",
    "RED",
    "SHORT",
    "THIRD",
    "WIDE",
    "fit_x",
    "legend",
    "log_if_wide",
    "log_y",
    "plain",
    "rug",
    "stack",
    "styled",
    "thin",
    "title",
    "to_svg",
    "top_marks",
    "trend",
]

P = ParamSpec("P")
R = TypeVar("R")
Series = pd.Series  # of float, indexed by step

WIDE, HALF, THIRD = 9.6, 4.68, 3.04
"""Widths of a figure in inches; the page shows all of them at the same scale."""

INK, MUTED, RULE = "#2b3036", "#6b727b", "#e2e5e9"
BLUE, ORANGE, RED = "#2760c4", "#cf6a12", "#c93636"
_THEME = {INK: "ink", MUTED: "muted", RULE: "rule", BLUE: "blue", ORANGE: "orange", RED: "red"}
"""Each colour's CSS variable: a page that sets it recolours the charts."""

SHORT = 40
"""Series of fewer points are drawn as they are, with no average."""

_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 0.46, 0.2, 0.34, 0.4, 0.34
_SIZE = 8.5
_STEPS = [1, 2, 5, 10]
_BACKEND = re.compile("backend|interactive|toolbar|timezone|webagg|datapath|keymap")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with matplotlib's own defaults, whatever style the user's program set."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        defaults = {k: v for k, v in mpl.rcParamsDefault.items() if not _BACKEND.search(k)}
        with mpl.rc_context({**defaults, "svg.fonttype": "none"}):
            return function(*args, **kwargs)

    return wrapper


def plain(text: str) -> str:
    """`text` from a run, safe to hand to matplotlib: a ``$`` starts no formula."""
    return text.replace("$", r"\$")


def stack(*heights: float, width: float = WIDE) -> tuple[Figure, list[Axes]]:
    """A figure with axes of these `heights` in inches, the first on top, sharing the x axis."""
    total = _TOP + sum(heights) + _GAP * (len(heights) - 1) + _BOTTOM
    figure, axes, top = Figure(figsize=(width, total)), list[Axes](), total - _TOP
    for height in heights:
        box = (_LEFT / width, (top - height) / total, 1 - (_LEFT + _RIGHT) / width, height / total)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
        _dress(axes[-1])
        top -= height + _GAP
    for upper in axes[:-1]:
        upper.tick_params(axis="x", labelbottom=False)
    axes[-1].set_xlabel("step", loc="right", fontsize=_SIZE, color=MUTED, labelpad=2)
    return figure, axes


def _dress(ax: Axes) -> None:
    ax.set_facecolor("none")
    for side in ("top", "left", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set(color=MUTED, linewidth=0.6)
    ax.tick_params(labelsize=_SIZE, labelcolor=MUTED, color=MUTED, width=0.6, length=3)
    ax.tick_params(axis="y", length=0, pad=4)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(_ticks(ax), integer=True, steps=_STEPS, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))


def _ticks(ax: Axes) -> int:
    return 10 if ax.get_position().width > 0.9 else 5


def title(ax: Axes, text: str) -> None:
    """Names the y axis above it, at the figure's left edge, where it reads without turning."""
    box = ax.get_position()
    ax.set_title(text, loc="left", fontsize=_SIZE, color=INK, pad=7, x=-box.x0 / box.width)


def legend(ax: Axes) -> None:
    """A row of labels above the axes, at the right, for lines that have one."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.02),
            ncols=len(labels),
            fontsize=_SIZE,
            labelcolor=MUTED,
            frameon=False,
            borderaxespad=0,
            borderpad=0.2,
            handlelength=1.3,
            columnspacing=1.4,
        )


def log_y(ax: Axes, values: Series) -> None:
    """A logarithmic y axis that fits the positive `values`."""
    high = float(values.max())
    low = max(float(values[values > 0].min()), 1e-9 * high)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.4, high * 1.4)
    narrow = high / low < 50
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=7))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))


def log_if_wide(ax: Axes, values: Series) -> None:
    """A logarithmic y axis if `values` span over a decade, zeros at its foot; else one from 0."""
    if values.min() >= 0 and values.max() > 10 * values[values > 0].min():
        log_y(ax, values)
    else:
        ax.set_ylim(bottom=min(0.0, float(values.min())))


def fit_x(ax: Axes, frame: pd.DataFrame) -> None:
    """The x axis of all of the run's steps, the same on every chart."""
    ax.set_xlim(float(frame.index.min()) - 0.5, float(frame.index.max()) + 0.5)


def thin(series: Series, most: int = 1600) -> Series:
    """`series` with at most `most` points, keeping each stretch's smallest and largest."""
    if len(series) <= most:
        return series
    stretch = np.arange(len(series)) * (most // 2) // len(series)
    groups = series.groupby(stretch)
    return series.loc[sorted({*groups.idxmin(), *groups.idxmax()})]


def trend(
    ax: Axes, series: Series, color: str, label: str | None = None, *, smooth: bool = True
) -> None:
    """A light raw line under its exponential moving average, or the line alone if not `smooth`."""
    if len(series) < SHORT or not smooth:
        marker = {"marker": "o", "markersize": 3.2} if len(series) < 13 else {}
        line: dict[str, Any] = {"color": color, "linewidth": 1.3, "label": label, **marker}
        series = thin(series)
        ax.plot(series.index, series, **line)
        return
    raw = thin(series)
    ax.plot(raw.index, raw, color=color, linewidth=0.6, alpha=0.45)
    average = thin(series.ewm(span=max(5, len(series) // 50)).mean(), 800)
    ax.plot(average.index, average, color=color, linewidth=1.5, label=label)


def rug(ax: Axes, steps: Sequence[int], color: str, label: str, row: int = 0) -> None:
    """Marks `steps` by a strip along the bottom; neighbours make one bar."""
    if not len(steps):
        return
    ordered = np.unique(np.asarray(steps))
    low, high = ax.get_xlim()
    least = (high - low) / 300  # a single step among thousands must be seen
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > max(1.0, least)) + 1)
    bars = [(float(r[0]) - 0.5, max(float(r[-1] - r[0]) + 1, least)) for r in runs]
    place = (0.012 + 0.035 * row, 0.025)
    ax.broken_barh(
        bars, place, transform=ax.get_xaxis_transform(), color=color, label=label, linewidth=0
    )


def top_marks(ax: Axes, steps: Sequence[int], label: str) -> None:
    """Marks `steps` by small red triangles along the upper edge."""
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
            label=label,
            clip_on=False,
            transform=ax.get_xaxis_transform(),
        )


@styled
def to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element to stand inside a page: no prolog, no links, colours as CSS variables.

    Args:
        figure: what to draw.
        name: makes the element's ids unique in the page.
    """
    buffer = io.StringIO()
    mpl.rcParams["svg.hashsalt"] = name
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in _THEME.items():
        text = text.replace(color, f"var(--{variable}, {color})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans, sans-serif)", text)

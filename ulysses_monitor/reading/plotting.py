"""Plots any metrics of a run: those of the same kind share axes, and each is a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import charts
from ulysses_monitor.reading.selection import Steps, Times
from ulysses_monitor.reading.unmatched import find_unmatched, refuse_pattern
from ulysses_monitor.store import Block

if TYPE_CHECKING:
    from ulysses_monitor.reading.reader import RunReader

__all__ = ["plot_metrics"]

_MAX_LABELS, _MAX_CHARACTERS = 8, 90
"""More labels, or longer ones, do not fit in a row: a colour bar replaces the legend."""

_LEGEND_WIDTH = 1.2
"""Of a legend whose only entry is NaN or Inf, in inches."""

_CATEGORIES = (charts.BLUE, charts.ORANGE, "#2f8f5b", "#8a4fbf", "#1f93a8", "#b08a00", "#c2558f")


def plot_metrics(
    run: RunReader,
    patterns: Sequence[str],
    steps: Steps | None = None,
    times: Times | None = None,
) -> Figure:
    """Plots the metrics of `run` that match `patterns`; see `RunReader.plot`."""
    _check_patterns(run, patterns)
    block = run.block(*patterns, steps=steps, times=times)
    if not len(block.steps):
        raise InputError(
            f"plot: steps is {steps!r} and times is {times!r}; expected limits that include a "
            f"recorded step of {run}"
        )
    return _draw(block)


def _check_patterns(run: RunReader, patterns: Sequence[str]) -> None:
    if not patterns:
        raise InputError("plot: no pattern was given; expected one or more, such as 'grad/norm/*'")
    names = run.names()
    for pattern in find_unmatched(patterns, names):
        raise InputError(refuse_pattern("plot", pattern, run, names))


@charts.with_own_style
def _draw(block: Block) -> Figure:
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(block.names):
        groups.setdefault(_group_of(name), []).append(column)
    height = 2.6 if len(groups) == 1 else 1.7
    figure, axes = charts.stack_axes(*[height] * len(groups), margin=0.1)
    for ax, (group, columns) in zip(axes, groups.items(), strict=True):
        _draw_group(ax, block.select(columns), group)
    return figure


def _group_of(name: str) -> str:
    """Names a metric's group: ``grad/norm/layer`` for a layer, ``grad/norm`` for the total."""
    parts = name.split("/")
    return "/".join(parts[: 3 if len(parts) > 3 else 2])


def _draw_group(ax: Axes, block: Block, group: str) -> None:
    """Draws the metrics of one group, and marks the steps where one of them is NaN or Inf."""
    index = pd.Index(block.steps, name="step")
    values = np.asarray(block.values, np.float64)
    lines = [
        pd.Series(column, index)[present]
        for column, present in zip(values.T, block.present.T, strict=True)
    ]
    nonfinite = block.steps[(block.present & ~np.isfinite(values)).any(axis=1)].tolist()
    charts.fit_step_axis(ax, index)
    if len(lines) == 1:
        charts.draw_line(ax, lines[0], charts.BLUE, smooth=False)
    else:
        labels = _label_lines(block.names, group)
        _draw_lines(ax, lines, labels, room=_LEGEND_WIDTH if nonfinite else 0.0)
    drawn = pd.concat([line[np.isfinite(line)] for line in lines])
    if len(drawn):
        charts.choose_y_scale(ax, drawn)
    charts.mark_steps(ax, nonfinite, charts.RED, "NaN or Inf")
    charts.set_title(ax, charts.escape_math(block.names[0] if len(lines) == 1 else group))
    charts.add_legend(ax)


def _draw_lines(
    ax: Axes, lines: Sequence[pd.Series[float]], labels: Sequence[str], room: float
) -> None:
    """Draws lines with a legend, or with a colour bar that leaves `room` inches at its right."""
    has_legend = len(labels) <= _MAX_LABELS and sum(map(len, labels)) <= _MAX_CHARACTERS
    colors = _choose_colors(labels)
    for line, label, color in zip(lines, labels, colors, strict=True):
        drawn = charts.with_holes(line)
        ax.plot(
            drawn.index,
            drawn,
            color=color,
            linewidth=1.2 if has_legend else 0.9,
            marker="o" if len(drawn) < 13 else "",
            markersize=2.6,
            label=charts.escape_math(label) if has_legend else None,
        )
    if not has_legend:
        charts.add_color_bar(ax, ListedColormap(colors), *_label_ends(labels), room)


def _label_ends(labels: Sequence[str]) -> tuple[str, str]:
    """Labels the ends of a colour bar with the first and the last of `labels`, if short."""
    first, last = labels[0], labels[-1].removeprefix("layer ")
    if len(first) + len(last) > _MAX_CHARACTERS // 2:
        return f"{len(labels)} metrics, from first", "to last"
    return first, last


def _choose_colors(labels: Sequence[str]) -> list[str]:
    """Gives a few categories distinct colours; layers, and many lines, a sequence of colours."""
    if len(labels) <= len(_CATEGORIES) and not labels[0].startswith("layer "):
        return list(_CATEGORIES[: len(labels)])
    sequence = colormaps["viridis"]
    return [to_hex(sequence(x)) for x in np.linspace(0.0, 0.92, len(labels))]


def _label_lines(names: Sequence[str], group: str) -> list[str]:
    """Labels lines by what tells them apart, without dotted parts that all of them share."""
    scopes = [name.removeprefix(f"{group}/") for name in names]
    if group.endswith("/layer"):
        return [f"layer {scope}" for scope in scopes]
    parts = [scope.split(".") for scope in scopes]
    spare = min(map(len, parts)) - 1
    head = _count_shared(parts, spare)
    tail = _count_shared([part[::-1] for part in parts], spare - head)
    return [".".join(part[head : len(part) - tail]) for part in parts]


def _count_shared(parts: Sequence[Sequence[str]], limit: int) -> int:
    """Counts the leading parts that are equal in all of `parts`, up to `limit`."""
    return next((i for i in range(limit) if len({part[i] for part in parts}) > 1), limit)

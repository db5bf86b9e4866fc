"""The report's charts by section, each with a caption and a description in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ulysses_monitor.common.formatting import number
from ulysses_monitor.reading import charts
from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.report import plots
from ulysses_monitor.report.layers import draw_layers
from ulysses_monitor.report.plots import finite_values
from ulysses_monitor.report.recorded import Recorded, find_logged
from ulysses_monitor.report.svg import to_svg

__all__ = ["Chart", "draw_sections"]

_OVERHEAD = "monitor/overhead_percent/total"


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        svg: the ``<svg>`` element.
        alt: what it shows, in words, for readers who cannot see it.
        caption: how to read it; may be empty.
    """

    svg: str
    alt: str
    caption: str = ""


def draw_sections(recorded: Recorded, alerts: Sequence[int]) -> dict[str, list[Chart]]:
    """Draws the charts of each section of the report.

    Args:
        recorded: the run's metrics.
        alerts: the steps at which a rule fired.

    Returns:
        The charts by section; an empty list if the run recorded nothing for a section.
    """
    frame = recorded.frame
    if not len(frame):
        return {key: [] for key in ("loss", "logged", "gradients", "lora", "optimizer", "speed")}
    return {
        "loss": list(_draw_loss(frame, alerts)),
        "logged": list(_draw_logged(frame)),
        "gradients": list(_draw_gradients(recorded, alerts)),
        "lora": list(_draw_lora(recorded)),
        "optimizer": list(_draw_optimizer(recorded)),
        "speed": list(_draw_speed(frame)),
    }


def _draw_loss(frame: pd.DataFrame, alerts: Sequence[int]) -> Iterator[Chart]:
    loss, held_out = (finite_values(frame, f"{kind}/loss/total") for kind in ("train", "eval"))
    alt = f"Training loss by step, {_describe(loss)}."
    if len(held_out):
        alt += f" Held-out loss, {_describe(held_out)}."
    smoothed = len(loss) >= charts.MIN_SMOOTHED
    caption = "Thin line: every step. Thick line: moving average." if smoothed else ""
    yield from _make_chart("loss", plots.plot_loss(frame, alerts), alt, caption)


def _draw_logged(frame: pd.DataFrame) -> Iterator[Chart]:
    for i, name in enumerate(find_logged(frame.columns)):
        title = name.removeprefix("train/").removesuffix("/total")
        figure = plots.plot_metric(frame, name, title, width=charts.THIRD_WIDTH, smooth=False)
        alt = f"{title}, {_describe(finite_values(frame, name))}."
        yield from _make_chart(f"logged-{i}", figure, alt)


def _draw_gradients(recorded: Recorded, alerts: Sequence[int]) -> Iterator[Chart]:
    frame = recorded.frame
    norm = finite_values(frame, "grad/norm/total")
    alt = f"Gradient norm of all parameters by step, {_describe(norm)}."
    yield from _make_chart("norm", plots.plot_gradient_norm(frame, alerts), alt)
    yield from _draw_layers(recorded, "grad/norm", "gradient norm", charts.FULL_WIDTH)


def _draw_layers(recorded: Recorded, metric: str, label: str, width: float) -> Iterator[Chart]:
    grid = recorded.layers.get(metric)
    figure = draw_layers(grid, recorded.frame.index, label, width=width)
    if grid is not None and figure is not None:
        caption = _describe_peak(grid) + (_describe_spike(grid) if metric == "grad/norm" else "")
        caption += " Each column shows the maximum over its steps." if grid.is_merged else ""
        alt = f"Heat map of layers by steps, coloured by {label}. {caption}"
        yield from _make_chart(metric.replace("/", "-"), figure, alt, caption)


def _describe_peak(grid: LayerGrid) -> str:
    values = np.where(np.isfinite(grid.cells), grid.cells, -np.inf)
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    return f"Largest: {number(values[row, column])} in {_name_cell(grid, row, column)}."


def _describe_spike(grid: LayerGrid) -> str:
    """Describes the cell furthest above its own layer's median, if it is 3 times as high."""
    values = np.where(np.isfinite(grid.cells), grid.cells, np.nan)
    median = np.nanmedian(np.where(np.isnan(values).all(1, keepdims=True), 0.0, values), axis=1)
    times = np.divide(values, median[:, None], where=median[:, None] > 0, out=np.zeros_like(values))
    row, column = np.unravel_index(int(np.nanargmax(times)), times.shape)
    if times[row, column] < 3:
        return ""
    factor = number(times[row, column], 2)
    return f" Highest spike: {_name_cell(grid, row, column)}, {factor} times its layer's median."


def _name_cell(grid: LayerGrid, row: np.integer[Any], column: np.integer[Any]) -> str:
    first = grid.first + int(column) * grid.stride
    last = first + grid.stride - 1
    steps = f"steps {first:,} to {last:,}" if grid.is_merged else f"step {first:,}"
    return f"layer {grid.layers[int(row)]} at {steps}"


def _draw_lora(recorded: Recorded) -> Iterator[Chart]:
    ratio = finite_values(recorded.frame, "lora/grad_ratio_B_A/total")
    alt = f"Median over modules of B's gradient norm over A's, {_describe(ratio)}."
    caption = "Dashed line: equal gradients. The ratio is infinite while B is zero."
    yield from _make_chart("lora", plots.draw_lora(recorded.frame, recorded.band), alt, caption)


def _draw_optimizer(recorded: Recorded) -> Iterator[Chart]:
    frame = recorded.frame
    moments = (("optim/exp_avg_norm", "norm"), ("optim/exp_avg_sq_mean", "mean"))
    for metric, stat in moments:
        moment = metric.removeprefix("optim/").removesuffix(f"_{stat}")
        title = f"{stat.capitalize()} of {moment}, all parameters"
        figure = plots.plot_metric(frame, f"{metric}/total", title, smooth=False)
        alt = f"{title}, {_describe(finite_values(frame, f'{metric}/total'))}."
        yield from _make_chart(f"{metric.replace('/', '-')}-total", figure, alt)
    for metric, stat in moments:
        yield from _draw_layers(recorded, metric, stat, charts.HALF_WIDTH)


def _draw_speed(frame: pd.DataFrame) -> Iterator[Chart]:
    if {"monitor/overhead_seconds/total", "train/step_seconds/total"} <= set(frame.columns):
        seconds = frame["train/step_seconds/total"]
        percent = 100 * frame["monitor/overhead_seconds/total"] / seconds.where(seconds > 0)
        frame = frame.assign(**{_OVERHEAD: percent})
    for name, title in (
        ("train/tokens_per_second/total", "Tokens per second"),
        ("train/step_seconds/total", "Seconds per step"),
        (_OVERHEAD, "Monitor overhead, % of step time"),
    ):
        figure = plots.plot_metric(frame, name, title, width=charts.THIRD_WIDTH)
        alt = f"{title}, {_describe(finite_values(frame, name))}."
        yield from _make_chart(name.split("/")[1], figure, alt)
    yield from _draw_memory(frame)


def _draw_memory(frame: pd.DataFrame) -> Iterator[Chart]:
    for name, title in (
        ("system/host_memory_bytes/total", "Host memory, GiB, largest over ranks"),
        ("system/device_memory_peak_bytes/total", "Peak device memory, GiB, largest over ranks"),
    ):
        gib = finite_values(frame, name) / 2**30
        scaled = frame.assign(**{name: gib})
        figure = plots.plot_metric(scaled, name, title, width=charts.THIRD_WIDTH, smooth=False)
        yield from _make_chart(name.split("/")[1], figure, f"{title}, {_describe(gib)}.")


def _make_chart(name: str, figure: Figure | None, alt: str, caption: str = "") -> Iterator[Chart]:
    """Yields the chart, or nothing if there was nothing to draw."""
    if figure is not None:
        yield Chart(to_svg(figure, name), alt, caption)


def _describe(series: pd.Series[float]) -> str:
    """Describes a curve in words: its first and last value, and its range."""
    if not len(series):
        return "not recorded"
    ends = f"from {number(series.iloc[0])} to {number(series.iloc[-1])}"
    return f"{ends}, between {number(series.min())} and {number(series.max())}"

"""The report's charts: each with the words that a reader needs who does not see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.report import figures as fg
from ulysses_monitor.report import plots
from ulysses_monitor.report.formatting import number
from ulysses_monitor.report.layers import build_layer_grid, plot_layers

__all__ = ["Chart", "draw_charts"]

_OVERHEAD = "monitor/overhead_percent/total"


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        svg: the ``<svg>`` element.
        alt: what it shows, in words.
        caption: how to read it; may be empty.
    """

    svg: str
    alt: str
    caption: str = ""


def draw_charts(frame: pd.DataFrame, alerts: Sequence[int]) -> dict[str, list[Chart]]:
    """The charts of each section; an empty list where the run recorded nothing for it.

    Args:
        frame: the run's metrics.
        alerts: steps at which a rule fired.
    """
    if not len(frame):
        return {key: [] for key in ("loss", "gradients", "lora", "optimizer", "speed")}
    return {
        "loss": list(_loss(frame, alerts)),
        "gradients": list(_gradients(frame, alerts)),
        "lora": list(_lora(frame)),
        "optimizer": list(_optimizer(frame)),
        "speed": list(_speed(frame)),
    }


def _loss(frame: pd.DataFrame, alerts: Sequence[int]) -> Iterator[Chart]:
    loss, held_out = (plots.finite(frame, f"{kind}/loss/total") for kind in ("train", "eval"))
    alt = f"Training loss over step, {_course(loss)}."
    if len(held_out):
        alt += f" Held-out loss, {_course(held_out)}."
    caption = "Thin: each step. Thick: moving average." if len(loss) >= fg.SHORT else ""
    yield from _chart("loss", plots.plot_loss(frame, alerts), alt, caption)


def _gradients(frame: pd.DataFrame, alerts: Sequence[int]) -> Iterator[Chart]:
    norm = plots.finite(frame, "grad/norm/total")
    alt = f"Gradient norm of all parameters over step, {_course(norm)}."
    yield from _chart("norm", plots.plot_gradient_norm(frame, alerts), alt)
    yield from _layers(frame, "grad/norm", "gradient norm", fg.WIDE)


def _layers(frame: pd.DataFrame, metric: str, label: str, width: float) -> Iterator[Chart]:
    grid = build_layer_grid(frame, metric)
    figure = plot_layers(frame, metric, label, width=width)
    if grid is not None and figure is not None:
        peak = _peak(grid) + (_outlier(grid) if metric == "grad/norm" else "")
        peak += " Each column shows the largest of its steps." if grid.is_merged else ""
        alt = f"Picture of layers by steps, colour is the {label}. {peak}"
        yield from _chart(metric.replace("/", "-"), figure, alt, peak)


def _peak(grid: LayerGrid) -> str:
    values = np.where(np.isfinite(grid.cells), grid.cells, -np.inf)
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    return f"Largest: {number(values[row, column])} in {_place(grid, row, column)}."


def _outlier(grid: LayerGrid) -> str:
    """The cell that stands out most from its own layer, where one does."""
    values = np.where(np.isfinite(grid.cells), grid.cells, np.nan)
    median = np.nanmedian(np.where(np.isnan(values).all(1, keepdims=True), 0.0, values), axis=1)
    times = np.divide(values, median[:, None], where=median[:, None] > 0, out=np.zeros_like(values))
    row, column = np.unravel_index(int(np.nanargmax(times)), times.shape)
    if times[row, column] < 3:
        return ""
    much = number(times[row, column], 2)
    return f" Furthest above its layer's median: {_place(grid, row, column)}, {much} times."


def _place(grid: LayerGrid, row: np.integer[Any], column: np.integer[Any]) -> str:
    step = grid.first + int(column) * grid.stride
    at = f"steps {step:,} to {step + grid.stride - 1:,}" if grid.is_merged else f"step {step:,}"
    return f"layer {grid.layers[int(row)]} at {at}"


def _lora(frame: pd.DataFrame) -> Iterator[Chart]:
    ratio = plots.finite(frame, "lora/grad_ratio_B_A/total")
    alt = f"Median over modules of B's gradient norm over A's, {_course(ratio)}."
    caption = "Dashed: both sides get the same gradient. Infinite while B is still zero."
    yield from _chart("lora", plots.plot_lora(frame), alt, caption)


def _optimizer(frame: pd.DataFrame) -> Iterator[Chart]:
    for metric, name in (
        ("optim/exp_avg_norm", "Norm of exp_avg"),
        ("optim/exp_avg_sq_mean", "Mean of exp_avg_sq"),
    ):
        series = plots.finite(frame, f"{metric}/total")
        figure = plots.plot_metric(
            frame, f"{metric}/total", f"{name}, all parameters", smooth=False
        )
        yield from _chart(
            f"{metric.replace('/', '-')}-total", figure, f"{name}, {_course(series)}."
        )
    for metric, name in (("optim/exp_avg_norm", "norm"), ("optim/exp_avg_sq_mean", "mean")):
        yield from _layers(frame, metric, name, fg.HALF)


def _speed(frame: pd.DataFrame) -> Iterator[Chart]:
    if {"monitor/overhead_seconds/total", "train/step_seconds/total"} <= set(frame.columns):
        seconds = frame["train/step_seconds/total"]
        percent = 100 * frame["monitor/overhead_seconds/total"] / seconds.where(seconds > 0)
        frame = frame.assign(**{_OVERHEAD: percent})
    for name, title in (
        ("train/tokens_per_second/total", "Tokens per second"),
        ("train/step_seconds/total", "Seconds per step"),
        (_OVERHEAD, "Monitor's share of the step, %"),
    ):
        figure = plots.plot_metric(frame, name, title, width=fg.THIRD)
        course = _course(plots.finite(frame, name))
        yield from _chart(name.split("/")[1], figure, f"{title}, {course}.")


def _chart(name: str, figure: Figure | None, alt: str, caption: str = "") -> Iterator[Chart]:
    if figure is not None:
        yield Chart(fg.to_svg(figure, name), alt, caption)


def _course(series: pd.Series[float]) -> str:
    """Where a curve starts, ends, and what it spans, in words."""
    if not len(series):
        return "not recorded"
    ends = f"from {number(series.iloc[0])} to {number(series.iloc[-1])}"
    return f"{ends}, between {number(series.min())} and {number(series.max())}"

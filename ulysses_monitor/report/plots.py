"""Plots what most runs have: loss, gradient norm, LoRA ratio, or one metric over the steps.

Each function takes a frame of `RunReader.metrics`, and returns a `matplotlib.figure.Figure`, or
None if the frame has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ulysses_monitor.common.formatting import share, tick
from ulysses_monitor.reading import charts
from ulysses_monitor.report.band import Band, build_band

__all__ = [
    "draw_lora",
    "finite_values",
    "nonfinite_steps",
    "plot_gradient_norm",
    "plot_lora",
    "plot_loss",
    "plot_metric",
]

_RATIO = "lora/grad_ratio_B_A"


def finite_values(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    """Returns the finite values of a metric; none if the frame does not have it."""
    if name not in frame:
        return pd.Series(dtype="float64")
    column: pd.Series[float] = frame[name]
    return column[np.isfinite(column)]


def _curve(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    """Returns the values of a metric to draw: finite, or infinite where the line has a hole."""
    if name not in frame:
        return pd.Series(dtype="float64")
    column: pd.Series[float] = frame[name]
    holes = pd.Series(np.inf, index=pd.Index(nonfinite_steps(frame, name)), dtype="float64")
    return pd.concat([column[np.isfinite(column)], holes]).sort_index()


@charts.with_own_style
def plot_loss(frame: pd.DataFrame, alerts: Sequence[int] = ()) -> Figure | None:
    """Plots the training loss, raw and smoothed, the held-out loss, and the learning rate below.

    Args:
        frame: ``train/loss/total``, ``eval/loss/total`` and ``optim/lr/*``; any may be missing.
        alerts: steps to mark.
    """
    loss, held_out = _curve(frame, "train/loss/total"), finite_values(frame, "eval/loss/total")
    if not len(loss) and not len(held_out):
        return None
    rates = _distinct_rates(frame)
    figure, axes = charts.stack_axes(*((2.7, 0.62) if rates else (2.7,)))
    _draw_loss(axes[0], loss, held_out)
    charts.fit_step_axis(axes[0], frame.index)
    charts.mark_steps(axes[0], nonfinite_steps(frame, "train/loss/total"), charts.RED, "NaN or Inf")
    charts.mark_alerts(axes[0], alerts)
    charts.set_title(axes[0], "Training and held-out loss")
    charts.add_legend(axes[0])
    if rates:
        _draw_rates(axes[1], rates)
    return figure


def _draw_loss(ax: Axes, loss: pd.Series[float], held_out: pd.Series[float]) -> None:
    if len(loss):
        charts.draw_line(ax, loss, charts.BLUE, "training")
    if len(held_out):
        ax.plot(
            held_out.index,
            held_out,
            color=charts.ORANGE,
            linewidth=1.1,
            marker="o",
            markersize=3.8,
            markeredgewidth=0,
            label="held-out",
        )


def _distinct_rates(frame: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """Returns up to four learning rates that differ, by parameter group."""
    rates: dict[str, pd.Series[float]] = {}
    for name in [n for n in frame.columns if n.startswith("optim/lr/")]:
        series = finite_values(frame, name)
        if len(series) and not any(series.equals(seen) for seen in rates.values()):
            rates[name.removeprefix("optim/lr/")] = series
    return dict(list(rates.items())[:4])


def _draw_rates(ax: Axes, rates: dict[str, pd.Series[float]]) -> None:
    dashes = ("-", "--", ":", "-.")
    for (group, series), dash in zip(rates.items(), dashes, strict=False):
        label = charts.escape_math(f"group {group}") if len(rates) > 1 else None
        marker = "o" if len(series) == 1 else ""
        ax.plot(
            series.index,
            series,
            color=charts.MUTED,
            linewidth=1.1,
            linestyle=dash,
            marker=marker,
            markersize=3.2,
            label=label,
        )
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(2, steps=charts.TICK_STEPS))
    charts.set_title(ax, "Learning rate")
    charts.add_legend(ax)


@charts.with_own_style
def plot_gradient_norm(frame: pd.DataFrame, alerts: Sequence[int] = ()) -> Figure | None:
    """Plots the total gradient norm before clipping, on a log scale if it spans over a decade.

    Args:
        frame: ``grad/norm/total``, and ``grad/clip_coef/total`` to mark clipped steps.
        alerts: steps to mark.
    """
    curve, norm = _curve(frame, "grad/norm/total"), finite_values(frame, "grad/norm/total")
    if not len(curve):
        return None
    figure, (ax,) = charts.stack_axes(2.1)
    charts.draw_line(ax, curve, charts.BLUE)
    if len(norm):
        charts.choose_y_scale(ax, norm)
    charts.fit_step_axis(ax, frame.index)
    coefficient = finite_values(frame, "grad/clip_coef/total").reindex(norm.index)
    clipped = norm.index[coefficient < 1]
    if len(clipped):
        threshold = float((coefficient * norm)[clipped].median())
        label = f"clipped at {tick(threshold)} ({share(len(clipped) / len(norm))} of steps)"
        ax.axhline(threshold, color=charts.ORANGE, linewidth=0.9, linestyle=(0, (4, 3)))
        charts.mark_steps(ax, clipped.tolist(), charts.ORANGE, label)
    charts.mark_steps(
        ax, nonfinite_steps(frame, "grad/norm/total"), charts.RED, "NaN or Inf", row=1
    )
    charts.mark_alerts(ax, alerts)
    charts.set_title(ax, "Gradient norm, all parameters")
    charts.add_legend(ax)
    return figure


def plot_lora(frame: pd.DataFrame) -> Figure | None:
    """Plots the ratio of B's gradient norm to A's: the median of the modules, and a band.

    The band covers the 10th to the 90th percentile of the modules.

    Args:
        frame: ``lora/grad_ratio_B_A/*``.
    """
    modules = [name for name in frame.columns if name.startswith(f"{_RATIO}/module/")]
    return draw_lora(frame, build_band([frame[modules]]))


@charts.with_own_style
def draw_lora(frame: pd.DataFrame, band: Band | None) -> Figure | None:
    """Draws the chart of `plot_lora` from its parts.

    Args:
        frame: ``lora/grad_ratio_B_A/total``.
        band: of the modules; None if there is none.
    """
    if f"{_RATIO}/total" not in frame:
        return None
    total = frame[f"{_RATIO}/total"]
    drawn = total[np.isfinite(total) & (total > 0)]
    if not len(drawn):
        return None
    figure, (ax,) = charts.stack_axes(2.3)
    ends = _draw_band(ax, band) if band is not None else []
    charts.draw_line(ax, drawn, charts.BLUE, "median", smooth=False)
    charts.set_log_scale(ax, pd.concat([drawn, *ends, pd.Series([1.0])]))
    charts.fit_step_axis(ax, frame.index)
    ax.axhline(1, color=charts.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    _note_infinite(ax, total.index[np.isposinf(total)])
    charts.set_title(ax, "LoRA gradient norm ratio, B / A")
    charts.add_legend(ax)
    return figure


def _draw_band(ax: Axes, band: Band) -> list[pd.Series[float]]:
    ax.fill_between(
        band.low.index,
        band.low,
        band.high,
        color=charts.BLUE,
        alpha=0.16,
        linewidth=0,
        label=f"10th to 90th percentile of {band.modules} modules",
    )
    return [band.low, band.high]


def _note_infinite(ax: Axes, steps: pd.Index[int]) -> None:
    if len(steps):
        more = f" and {len(steps) - 1} more steps" if len(steps) > 1 else ""
        ax.annotate(
            f"∞ at step {steps[0]:,}{more}",
            (steps[0], 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=charts.FONT_SIZE,
            color=charts.MUTED,
        )


@charts.with_own_style
def plot_metric(
    frame: pd.DataFrame,
    name: str,
    title: str,
    *,
    width: float = charts.HALF_WIDTH,
    smooth: bool = True,
) -> Figure | None:
    """Plots one metric over the steps; a line joins the points of a sampled one.

    Args:
        frame: holds `name`.
        name: the metric to plot.
        title: its name in the chart.
        width: of the figure, in inches.
        smooth: whether to draw a moving average.
    """
    series = finite_values(frame, name)
    if not len(series):
        return None
    figure, (ax,) = charts.stack_axes(1.5, width=width)
    charts.draw_line(ax, series, charts.BLUE, smooth=smooth)
    charts.choose_y_scale(ax, series)
    charts.fit_step_axis(ax, frame.index)
    charts.set_title(ax, title)
    return figure


def nonfinite_steps(frame: pd.DataFrame, name: str) -> list[int]:
    """Returns the trained steps in which a metric is not finite."""
    if name not in frame:
        return []
    trained = frame.get("train/step_seconds/total", frame[name]).notna()
    nonfinite = (trained | np.isinf(frame[name])) & ~np.isfinite(frame[name])
    return [int(step) for step in frame.index[nonfinite]]

"""A run's metrics as charts: each function takes a frame of `RunReader.metrics`.

All return a `matplotlib.figure.Figure`, or None where the frame holds nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ulysses_monitor.report import figures as fg
from ulysses_monitor.report.formatting import share, tick
from ulysses_monitor.report.layers import plot_layers

__all__ = [
    "broken_steps",
    "finite",
    "plot_gradient_norm",
    "plot_layers",
    "plot_lora",
    "plot_loss",
    "plot_metric",
]

_RATIO = "lora/grad_ratio_B_A"


def finite(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    """The finite values of `name`, empty where the frame has no such column."""
    if name not in frame:
        return pd.Series(dtype="float64")
    column: pd.Series[float] = frame[name]
    return column[np.isfinite(column)]


@fg.styled
def plot_loss(frame: pd.DataFrame, alerts: Sequence[int] = ()) -> Figure | None:
    """Training loss, raw and smoothed, with held-out loss; the learning rate beneath.

    Args:
        frame: ``train/loss/total``, ``eval/loss/total`` and ``optim/lr/*``, as far as recorded.
        alerts: steps to mark.
    """
    loss, held_out = finite(frame, "train/loss/total"), finite(frame, "eval/loss/total")
    if not len(loss) and not len(held_out):
        return None
    rates = _distinct_rates(frame)
    figure, axes = fg.stack(*((2.7, 0.62) if rates else (2.7,)))
    _draw_loss(axes[0], loss, held_out)
    fg.fit_x(axes[0], frame)
    fg.rug(axes[0], broken_steps(frame, "train/loss/total"), fg.RED, "not finite")
    fg.top_marks(axes[0], alerts, "alert")
    fg.title(axes[0], "Training and held-out loss")
    fg.legend(axes[0])
    if rates:
        _draw_rates(axes[1], rates)
    return figure


def _draw_loss(ax: Axes, loss: pd.Series[float], held_out: pd.Series[float]) -> None:
    if len(loss):
        fg.trend(ax, loss, fg.BLUE, "training")
    if len(held_out):
        ax.plot(
            held_out.index,
            held_out,
            color=fg.ORANGE,
            linewidth=1.1,
            marker="o",
            markersize=3.8,
            markeredgewidth=0,
            label="held-out",
        )


def _distinct_rates(frame: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """Learning rates by group, one of each that are alike, four at most."""
    rates: dict[str, pd.Series[float]] = {}
    for name in [n for n in frame.columns if n.startswith("optim/lr/")]:
        series = finite(frame, name)
        if len(series) and not any(series.equals(seen) for seen in rates.values()):
            rates[name.removeprefix("optim/lr/")] = series
    return dict(list(rates.items())[:4])


def _draw_rates(ax: Axes, rates: dict[str, pd.Series[float]]) -> None:
    styles = ("-", "--", ":", "-.")
    for (group, series), style in zip(rates.items(), styles, strict=False):
        label = fg.plain(f"group {group}") if len(rates) > 1 else None
        marker = "o" if len(series) == 1 else ""
        ax.plot(
            series.index,
            series,
            color=fg.MUTED,
            linewidth=1.1,
            linestyle=style,
            marker=marker,
            markersize=3.2,
            label=label,
        )
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    fg.title(ax, "Learning rate")
    fg.legend(ax)


@fg.styled
def plot_gradient_norm(frame: pd.DataFrame, alerts: Sequence[int] = ()) -> Figure | None:
    """Total gradient norm before clipping; logarithmic where it spans more than a decade.

    Args:
        frame: ``grad/norm/total``, and ``grad/clip_coef/total`` to mark the clipped steps.
        alerts: steps to mark.
    """
    norm = finite(frame, "grad/norm/total")
    if not len(norm):
        return None
    figure, (ax,) = fg.stack(2.1)
    fg.trend(ax, norm, fg.BLUE, None)
    fg.log_if_wide(ax, norm)
    fg.fit_x(ax, frame)
    coefficient = finite(frame, "grad/clip_coef/total").reindex(norm.index)
    clipped = norm.index[coefficient < 1]
    if len(clipped):
        threshold = float((coefficient * norm)[clipped].median())
        label = f"clipped at {tick(threshold)}: {share(len(clipped) / len(norm))} of steps"
        ax.axhline(threshold, color=fg.ORANGE, linewidth=0.9, linestyle=(0, (4, 3)))
        fg.rug(ax, clipped.tolist(), fg.ORANGE, label)
    fg.rug(ax, broken_steps(frame, "grad/norm/total"), fg.RED, "not finite", row=1)
    fg.top_marks(ax, alerts, "alert")
    fg.title(ax, "Gradient norm, all parameters")
    fg.legend(ax)
    return figure


@fg.styled
def plot_lora(frame: pd.DataFrame) -> Figure | None:
    """Median over the adapters of B's gradient norm over A's, with the 10 to 90 percentile band.

    Args:
        frame: ``lora/grad_ratio_B_A/*``.
    """
    if f"{_RATIO}/total" not in frame:
        return None
    total = frame[f"{_RATIO}/total"]
    drawn = total[np.isfinite(total) & (total > 0)]
    if not len(drawn):
        return None
    figure, (ax,) = fg.stack(2.3)
    band = _draw_band(ax, frame)
    fg.trend(ax, drawn, fg.BLUE, "median", smooth=False)
    fg.log_y(ax, pd.concat([drawn, *band, pd.Series([1.0])]))
    fg.fit_x(ax, frame)
    ax.axhline(1, color=fg.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    _say_infinite(ax, total.index[np.isposinf(total)])
    fg.title(ax, "Gradient norm of B over A")
    fg.legend(ax)
    return figure


def _draw_band(ax: Axes, frame: pd.DataFrame) -> list[pd.Series[float]]:
    modules = frame[[n for n in frame.columns if n.startswith(f"{_RATIO}/module/")]]
    modules = modules.where(np.isfinite(modules) & (modules > 0)).dropna(how="all")
    if modules.shape[1] < 2 or not len(modules):
        return []
    low, high = modules.quantile(0.1, axis=1), modules.quantile(0.9, axis=1)
    every = max(1, len(modules) // 800)
    low, high = (s.rolling(every, min_periods=1).median().iloc[::every] for s in (low, high))
    ax.fill_between(
        low.index,
        low,
        high,
        color=fg.BLUE,
        alpha=0.16,
        linewidth=0,
        label=f"10th to 90th percentile of {modules.shape[1]} modules",
    )
    return [low, high]


def _say_infinite(ax: Axes, steps: pd.Index[int]) -> None:
    if len(steps):
        more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
        ax.annotate(
            f"∞ at step {steps[0]:,}{more}",
            (steps[0], 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=8.5,
            color=fg.MUTED,
        )


@fg.styled
def plot_metric(
    frame: pd.DataFrame, name: str, title: str, *, width: float = fg.HALF, smooth: bool = True
) -> Figure | None:
    """One metric over step; sampled points are joined.

    Args:
        frame: holds `name`.
        name: the metric.
        title: what to call it.
        width: of the figure, in inches.
        smooth: whether to draw a moving average.
    """
    series = finite(frame, name)
    if not len(series):
        return None
    figure, (ax,) = fg.stack(1.5, width=width)
    fg.trend(ax, series, fg.BLUE, smooth=smooth)
    fg.log_if_wide(ax, series)
    fg.fit_x(ax, frame)
    fg.title(ax, title)
    return figure


def broken_steps(frame: pd.DataFrame, name: str) -> list[int]:
    """Steps that were trained and have no finite value of `name`."""
    if name not in frame:
        return []
    trained = frame.get("train/step_seconds/total", frame[name]).notna()
    broken = (trained | np.isinf(frame[name])) & ~np.isfinite(frame[name])
    return [int(step) for step in frame.index[broken]]

"""The picture of `ulysses check-data`: how long rows are, and what was found."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ulysses_core.data.health import Health
from ulysses_monitor.common.formatting import tick
from ulysses_monitor.reading import charts

__all__ = ["write_picture"]

_COLORS = {"serious": charts.RED, "warning": charts.ORANGE, "note": charts.BLUE}


def write_picture(health: Health, cutoff: int, path: Path) -> None:
    """Writes a picture; the format follows from the file's name.

    Args:
        health: what was found.
        cutoff: ``cutoff_len``, which is marked.
        path: the file.

    Raises:
        InputError: the file cannot be written, or there is nothing to draw.
    """
    has_rows = any(split.histogram for split in health.splits.values())
    charts.save_figure("check-data", _draw(health, cutoff) if has_rows else None, path)


@charts.with_own_style
def _draw(health: Health, cutoff: int) -> Figure:
    figure = Figure(figsize=(charts.FULL_WIDTH, 4.2), layout="constrained")
    lengths, found = figure.subplots(1, 2)
    _draw_lengths(lengths, health, cutoff)
    _draw_findings(found, health)
    for ax in (lengths, found):
        ax.tick_params(labelsize=charts.FONT_SIZE)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure


def _draw_lengths(ax: Axes, health: Health, cutoff: int) -> None:
    for (name, split), color in zip(
        health.splits.items(), (charts.BLUE, charts.ORANGE), strict=False
    ):
        edges = [0.5, *(float(edge) for edge, _ in split.histogram)]
        rows = [rows for _, rows in split.histogram]
        ax.stairs(rows, edges, fill=True, color=color, alpha=0.6, label=name)
    used = [edge for split in health.splits.values() for edge, rows in split.histogram if rows]
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(used) / 2, 1.2 * max(*used, cutoff))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    ax.axvline(cutoff, color=charts.RED, linewidth=0.9, label="cutoff_len")
    ax.set_xlabel("tokens of a row", fontsize=charts.FONT_SIZE)
    ax.set_title("Rows by length", fontsize=charts.FONT_SIZE, loc="left")
    ax.legend(fontsize=charts.FONT_SIZE, frameon=False)


def _draw_findings(ax: Axes, health: Health) -> None:
    counted = [finding for finding in health.findings if finding.count][::-1]
    colors = [_COLORS[finding.severity] for finding in counted]
    bars = ax.barh([f.check for f in counted], [f.count or 0 for f in counted], color=colors)
    if counted:
        ax.set_xscale("symlog")
        labels = [f"{finding.count:,}" for finding in counted]
        ax.bar_label(bars, labels, padding=3, fontsize=charts.FONT_SIZE)
    ax.xaxis.set_visible(False)  # the bars have labels
    ax.set_title("Rows with findings", fontsize=charts.FONT_SIZE, loc="left")

"""Draws a grid of layers by steps, on the sink's own thread.

It uses only matplotlib's object API and no ``rc_context``, because settings are global and the
training thread may be drawing with pyplot at the same time.

Legend: L layers, C columns.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ulysses_monitor.records.layer_grid import LayerGrid

__all__ = ["Picture", "draw"]

_DPI = 100
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 7.2, 0.72, 1.2, 0.75, 0.68
_SIZE = 12
"""Font size in points; TensorBoard shows the picture at half its size until it is clicked."""

_INK, _MUTED, _NOTHING, _BROKEN = "#2b3036", "#5b626b", "#e2e5e9", "#00b8d4"
_STEPS = [1, 2, 5, 10]
_DECADES = 6.0
"""Range of the colours; smaller values are as good as zero and would use up the colours."""


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Attributes:
        png: the file's bytes.
        size: width and height in pixels.
    """

    png: bytes
    size: tuple[int, int]


def draw(grid: LayerGrid) -> Picture:
    """Draws the grid: rows are layers, columns are steps, colour is log10 of the value."""
    rows = min(6.0, max(1.9, 0.15 * len(grid.layers)))
    height = _TOP + rows + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    width = (_WIDTH - _LEFT - _RIGHT) / _WIDTH
    ax = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / height, width, rows / height))
    logs, broken = _log10(grid.cells)
    _paint(figure, ax, grid, logs)
    _mark(ax, grid, broken)
    _label(ax, grid)
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    return Picture(buffer.getvalue(), canvas.get_width_height())


def _log10(
    cells: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Returns log10 of the cells [L, C], and which cells are not finite [L, C].

    Cells without a value stay NaN; zeros get the lowest value.
    """
    broken = np.isinf(cells)
    positive = np.isfinite(cells) & (cells > 0)
    logs = np.full_like(cells, np.nan)
    logs[positive] = np.log10(cells[positive])
    high = logs[positive].max() if positive.any() else 0.0
    low = max(logs[positive].min(), high - _DECADES) if positive.any() else -1.0
    logs[cells == 0] = low
    return np.maximum(logs, low, where=~np.isnan(logs), out=logs), broken


def _paint(figure: Figure, ax: Axes, grid: LayerGrid, logs: npt.NDArray[np.float64]) -> None:
    ax.set_facecolor(_NOTHING)
    known = logs[~np.isnan(logs)]
    low, high = (known.min(), known.max()) if len(known) else (-1.0, 0.0)
    image = ax.imshow(
        logs,
        cmap=colormaps["magma"],
        vmin=min(low, high - 0.2),
        vmax=high,
        origin="lower",
        aspect="auto",
        interpolation="none",
        extent=_extent(grid),
    )
    box = ax.get_position()
    bar_axes = figure.add_axes((box.x1 + 0.02, box.y0, 0.022, box.height))
    bar = figure.colorbar(image, cax=bar_axes)
    bar.set_label("log10 of the norm", fontsize=_SIZE, color=_MUTED)
    bar.ax.tick_params(labelsize=_SIZE, labelcolor=_MUTED, color=_MUTED)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    bar.outline.set_visible(False)


def _mark(ax: Axes, grid: LayerGrid, broken: npt.NDArray[np.bool_]) -> None:
    if broken.any():
        cells = np.zeros((*broken.shape, 4))
        cells[broken] = to_rgba(_BROKEN)
        ax.imshow(cells, origin="lower", aspect="auto", interpolation="none", extent=_extent(grid))
        ax.legend(
            handles=[Patch(color=_BROKEN, label="NaN or Inf")],
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            fontsize=_SIZE,
            frameon=False,
            labelcolor=_INK,
        )


def _label(ax: Axes, grid: LayerGrid) -> None:
    note = f", each column the largest of {grid.stride}" if grid.is_merged else ""
    title = f"Gradient norm by layer, to step {grid.last:,}"
    ax.set_title(title, loc="left", fontsize=_SIZE, color=_INK, pad=9)
    ax.set_xlabel(f"step{note}", fontsize=_SIZE, color=_MUTED)
    ax.set_ylabel("layer", fontsize=_SIZE, color=_MUTED)
    ax.tick_params(labelsize=_SIZE, labelcolor=_MUTED, color=_MUTED)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**6) if len(grid.layers) / n <= 10)
    places = range(0, len(grid.layers), every)
    ax.set_yticks(list(places), [str(grid.layers[i]) for i in places])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _extent(grid: LayerGrid) -> tuple[float, float, float, float]:
    start = grid.first - 0.5
    return start, start + grid.cells.shape[1] * grid.stride, -0.5, len(grid.layers) - 0.5

"""Plots a metric of every layer as a heat map of layers by steps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ulysses_monitor.common.formatting import tick
from ulysses_monitor.reading import charts
from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.records.layers import Layer, order_layers

__all__ = ["MAX_COLUMNS", "build_layer_grid", "draw_layers", "plot_layers"]

_LEGEND_WIDTH = 1.2
"""Of a legend whose only entry is NaN or Inf, in inches."""

MAX_COLUMNS = 640
"""Columns are wider than a pixel on paper and on screen, so that no spike is lost."""


def build_layer_grid(frame: pd.DataFrame, metric: str = "grad/norm") -> LayerGrid | None:
    """Builds the grid of the ``<metric>/layer/*`` columns of `frame`; None if it has no value."""
    prefix = f"{metric}/layer/"
    layers = order_layers(n.removeprefix(prefix) for n in frame.columns if n.startswith(prefix))
    rows = frame[[f"{prefix}{layer}" for layer in layers]].dropna(how="all")
    if not layers or not len(rows):
        return None
    steps = rows.index.to_numpy(dtype=np.int64)
    return LayerGrid.from_table(layers, steps, rows.to_numpy(), most_columns=MAX_COLUMNS)


def plot_layers(
    frame: pd.DataFrame,
    metric: str = "grad/norm",
    label: str = "gradient norm",
    *,
    width: float = charts.FULL_WIDTH,
) -> Figure | None:
    """Plots a metric of every layer as a heat map on a logarithmic colour scale.

    Args:
        frame: ``<metric>/layer/*``.
        metric: family and stat of the metric.
        label: the metric's name in the chart.
        width: of the figure, in inches.

    Returns:
        The figure; None if the frame has no positive finite value of the metric.
    """
    return draw_layers(build_layer_grid(frame, metric), frame.index, label, width=width)


@charts.with_own_style
def draw_layers(
    grid: LayerGrid | None, steps: pd.Index[int], label: str, *, width: float = charts.FULL_WIDTH
) -> Figure | None:
    """Draws the chart of `plot_layers` from its grid.

    Args:
        grid: of the metric; None if there is nothing to draw.
        steps: all steps of the run.
        label: the metric's name in the chart.
        width: of the figure, in inches.
    """
    if grid is None or not (grid.cells[np.isfinite(grid.cells)] > 0).any():
        return None
    figure, (ax,) = charts.stack_axes(min(3.2, max(0.5, 0.095 * len(grid.layers))), width=width)
    image = _draw_grid(ax, grid)
    has_holes = _mark_holes(ax, grid)
    _set_layer_ticks(ax, grid.layers)
    charts.fit_step_axis(ax, steps)
    charts.set_title(ax, "Layer")
    low, high = image.get_clim()
    room = _LEGEND_WIDTH if has_holes else 0.0
    charts.add_color_bar(ax, image.cmap, f"{label}   {tick(low, 2)}", tick(high, 2), room)
    if has_holes:
        charts.add_legend(ax)
    return figure


def _draw_grid(ax: Axes, grid: LayerGrid) -> AxesImage:
    good = grid.cells[np.isfinite(grid.cells) & (grid.cells > 0)]
    high = float(good.max())
    low = min(max(float(good.min()), high * 1e-6), high / 1.5)
    ax.grid(visible=False)
    return ax.imshow(
        np.where(np.isfinite(grid.cells), np.clip(grid.cells, low, high), np.nan),
        norm=LogNorm(low, high),
        cmap=colormaps["magma"],
        origin="lower",
        aspect="auto",
        interpolation="none",
        extent=_extent(grid),
    )


def _mark_holes(ax: Axes, grid: LayerGrid) -> bool:
    """Paints the cells that are not finite, which no colour of the scale may stand for."""
    is_broken = np.isinf(grid.cells)
    if is_broken.any():
        cells = np.zeros((*is_broken.shape, 4))
        cells[is_broken] = to_rgba(charts.RED)
        ax.imshow(cells, origin="lower", aspect="auto", interpolation="none", extent=_extent(grid))
        ax.fill_between([], [], [], color=charts.RED, label="NaN or Inf", linewidth=0)
    return bool(is_broken.any())


def _extent(grid: LayerGrid) -> tuple[float, float, float, float]:
    half = grid.stride / 2 if grid.stride > 1 else 0.5
    end = grid.first + grid.stride * grid.cells.shape[1]
    return grid.first - half, end - half, -0.5, len(grid.layers) - 0.5


def _set_layer_ticks(ax: Axes, layers: tuple[Layer, ...]) -> None:
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 10**6) if len(layers) / n <= 9)
    places = range(0, len(layers), every)
    ax.set_yticks(list(places), [str(layers[i]) for i in places])

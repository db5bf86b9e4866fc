"""Layers by steps: a metric of every layer as a grid, and the grid as a picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.report import figures as fg
from ulysses_monitor.report.formatting import tick

__all__ = ["build_layer_grid", "plot_layers"]

_MOST_COLUMNS = 640
"""So few that a column is wider than a pixel on paper and on screen."""


def build_layer_grid(frame: pd.DataFrame, metric: str = "grad/norm") -> LayerGrid | None:
    """Builds the grid of the ``<metric>/layer/*`` columns of `frame`; None if it has no value."""
    prefix = f"{metric}/layer/"
    found = {n.removeprefix(prefix): n for n in frame.columns if n.startswith(prefix)}
    names = {int(index): name for index, name in found.items() if index.isdecimal()}
    layers = tuple(sorted(names))
    rows = frame[[names[i] for i in layers]].dropna(how="all")
    if not layers or not len(rows):
        return None
    steps = rows.index.to_numpy(dtype=np.int64)
    return LayerGrid.from_table(layers, steps, rows.to_numpy(), most_columns=_MOST_COLUMNS)


@fg.styled
def plot_layers(
    frame: pd.DataFrame,
    metric: str = "grad/norm",
    label: str = "gradient norm",
    *,
    width: float = fg.WIDE,
) -> Figure | None:
    """Layers by steps as a picture, on a logarithmic colour scale.

    Args:
        frame: holds ``<metric>/layer/*``.
        metric: family and stat of the metric.
        label: what to call it.
        width: of the figure, in inches.
    """
    grid = build_layer_grid(frame, metric)
    if grid is None or not (grid.cells[np.isfinite(grid.cells)] > 0).any():
        return None
    figure, (ax,) = fg.stack(min(3.2, max(0.5, 0.095 * len(grid.layers))), width=width)
    image = _draw_grid(ax, grid)
    _layer_ticks(ax, grid.layers)
    fg.fit_x(ax, frame)
    fg.title(ax, "Layer")
    _color_bar(figure, image, label)
    return figure


def _draw_grid(ax: Axes, grid: LayerGrid) -> AxesImage:
    good = grid.cells[np.isfinite(grid.cells) & (grid.cells > 0)]
    high = float(good.max())
    low = min(max(float(good.min()), high * 1e-6), high / 1.5)
    half = grid.stride / 2 if grid.stride > 1 else 0.5
    end = grid.first + grid.stride * grid.cells.shape[1]
    ax.grid(visible=False)
    return ax.imshow(
        np.where(np.isnan(grid.cells), np.nan, np.clip(grid.cells, low, high)),
        norm=LogNorm(low, high),
        cmap=colormaps["magma"],
        origin="lower",
        aspect="auto",
        interpolation="none",
        extent=(grid.first - half, end - half, -0.5, len(grid.layers) - 0.5),
    )


def _layer_ticks(ax: Axes, layers: tuple[int, ...]) -> None:
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 10**6) if len(layers) / n <= 9)
    places = range(0, len(layers), every)
    ax.set_yticks(list(places), [str(layers[i]) for i in places])


def _color_bar(figure: Figure, image: AxesImage, label: str) -> None:
    """A small horizontal colour bar above the picture, so that its x axis meets the charts'."""
    width, height = figure.get_size_inches()
    place = ((width - 2.0) / width, 1 - 0.22 / height, 1.35 / width, 0.085 / height)
    box = figure.add_axes(place, label="colour bar")
    box.imshow(np.linspace(0, 1, 64)[None, :], cmap=image.cmap, aspect="auto")
    box.set_axis_off()
    low, high = image.get_clim()
    for x, side, text in (
        (-0.04, "right", f"{label}   {tick(low, 2)}"),
        (1.04, "left", tick(high, 2)),
    ):
        box.text(
            x,
            0.5,
            fg.plain(text),
            ha=side,
            va="center_baseline",
            transform=box.transAxes,
            fontsize=8.5,
            color=fg.MUTED,
        )

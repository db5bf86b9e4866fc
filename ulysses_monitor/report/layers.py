"""Layers by steps: a metric of every layer as a grid, and the grid as a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ulysses_monitor.common.formatting import tick
from ulysses_monitor.reading import chart_style as style

__all__ = ["LayerGrid", "layer_grid", "plot_layers"]

_MOST_COLUMNS = 640
"""So few that a column is wider than a pixel on paper and on screen: no spike falls between two."""


@dataclass(frozen=True)
class LayerGrid:
    """A metric of every layer, aggregated to columns of `stride` steps by their largest value.

    Attributes:
        layers: layer indices, ascending [L].
        first: step of the first column.
        stride: steps that a column covers.
        cells: [L, columns]; NaN where nothing was recorded.
        merged: whether a column holds more than one recorded step.
    """

    layers: tuple[int, ...]
    first: int
    stride: int
    cells: npt.NDArray[np.float64]
    merged: bool


def layer_grid(frame: pd.DataFrame, metric: str = "grad/norm") -> LayerGrid | None:
    """The ``<metric>/layer/*`` columns of `frame` as a grid, ordered by the layers' numbers."""
    prefix = f"{metric}/layer/"
    found = {n.removeprefix(prefix): n for n in frame.columns if n.startswith(prefix)}
    names = {int(index): name for index, name in found.items() if index.isdecimal()}
    layers = tuple(sorted(names))
    rows = frame[[names[i] for i in layers]].dropna(how="all")
    if not layers or not len(rows):
        return None
    steps = rows.index.to_numpy(dtype=np.int64)
    between = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    columns = (int(steps[-1]) - int(steps[0])) // between + 1
    stride = between * -(-columns // _MOST_COLUMNS)
    column = (steps - steps[0]) // stride
    values = rows.groupby(column).max().reindex(range(int(column[-1]) + 1))
    return LayerGrid(layers, int(steps[0]), stride, values.to_numpy().T, stride > between)


@style.with_own_style
def plot_layers(
    frame: pd.DataFrame,
    metric: str = "grad/norm",
    label: str = "gradient norm",
    *,
    width: float = style.FULL_WIDTH,
) -> Figure | None:
    """Layers by steps as a picture, on a logarithmic colour scale.

    Args:
        frame: holds ``<metric>/layer/*``.
        metric: family and stat of the metric.
        label: what to call it.
        width: of the figure, in inches.
    """
    grid = layer_grid(frame, metric)
    if grid is None or not (grid.cells[np.isfinite(grid.cells)] > 0).any():
        return None
    figure, (ax,) = style.stack_axes(min(3.2, max(0.5, 0.095 * len(grid.layers))), width=width)
    image = _draw_grid(ax, grid)
    _layer_ticks(ax, grid.layers)
    style.fit_step_axis(ax, frame.index)
    style.set_title(ax, "Layer")
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
            style.escape_math(text),
            ha=side,
            va="center_baseline",
            transform=box.transAxes,
            fontsize=8.5,
            color=style.MUTED,
        )

"""Decides when the picture of the layers is due, and what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.records.layers import Layer

if TYPE_CHECKING:
    from ulysses_monitor.sinks.tensorboard.heat_map import Picture

__all__ = ["LayerPictures"]

_MOST_COLUMNS = 400
"""So few that a column is wider than a pixel of the picture."""

_SECONDS = 30.0
"""Shortest time between two pictures, because drawing holds the GIL for a tenth of a second."""

_GROWTH = 0.02
"""Share of new steps after which a long run gets another picture, so that files stay small."""


class LayerPictures:
    """Gathers the gradient norms of the layers and draws them now and then.

    Args:
        every: fewest steps between two pictures; 0 for none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._grid: LayerGrid | None = None
        self._drawn_step, self._drawn_time = 0, -np.inf

    def add(
        self, step: int, time: float, layers: tuple[Layer, ...], norms: npt.NDArray[np.float64]
    ) -> Picture | None:
        """Adds the norms of a step; returns a picture if one is due."""
        if not self._every or not layers:
            return None
        if self._grid is None or self._grid.layers != layers or step < self._grid.first:
            self._grid = LayerGrid(layers, step, most_columns=_MOST_COLUMNS)
            self._drawn_step = step - 1
        self._grid.add(step, norms)
        self._drawn_step = min(self._drawn_step, step - 1)
        steps = step - self._drawn_step
        is_due = steps >= max(self._every, _GROWTH * (step - self._grid.first))
        if not is_due or time - self._drawn_time < _SECONDS:
            return None
        return self._draw(self._grid, time)

    def last(self) -> tuple[int, Picture] | None:
        """Returns the last step and its picture, or None if nothing is new since the last one."""
        if self._grid is None or self._grid.last == self._drawn_step:
            return None
        return self._grid.last, self._draw(self._grid, self._drawn_time)

    def _draw(self, grid: LayerGrid, time: float) -> Picture:
        from ulysses_monitor.sinks.tensorboard.heat_map import draw

        # Set first, so that a picture that cannot be drawn is not tried again at every step.
        self._drawn_step, self._drawn_time = grid.last, time
        return draw(grid)

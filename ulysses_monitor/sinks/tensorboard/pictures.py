"""When the picture of the layers is due, and what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records.layer_grid import LayerGrid

if TYPE_CHECKING:
    from ulysses_monitor.sinks.tensorboard.heat_map import Picture

__all__ = ["LayerPictures"]

_MOST_COLUMNS = 400
"""So few that a column is wider than a pixel of the picture."""

_SECONDS = 30.0
"""Drawing holds the interpreter's lock for a tenth of a second: seldom, however short the steps."""

_GROWTH = 0.02
"""A picture of a long run is drawn once it has this much more to show: files stay small."""


class LayerPictures:
    """Gathers the layers' gradient norms, and draws them every now and then.

    Args:
        every: steps between two pictures, at least; 0 for none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._grid: LayerGrid | None = None
        self._drawn_step, self._drawn_time = 0, -np.inf

    def add(
        self, step: int, time: float, layers: tuple[int, ...], norms: npt.NDArray[np.float64]
    ) -> Picture | None:
        """Adds a step's norms, and returns the picture where one is due."""
        if not self._every or not layers:
            return None
        if self._grid is None or self._grid.layers != layers or step < self._grid.first:
            self._grid = LayerGrid(layers, step, most_columns=_MOST_COLUMNS)
            self._drawn_step = step - 1
        self._grid.add(step, norms)
        self._drawn_step = min(self._drawn_step, step - 1)
        steps = step - self._drawn_step
        wide = steps >= max(self._every, _GROWTH * (step - self._grid.first))
        if not wide or time - self._drawn_time < _SECONDS:
            return None
        return self._draw(self._grid, time)

    def last(self) -> tuple[int, Picture] | None:
        """The step and the picture of what was added since the last picture, if that is any."""
        if self._grid is None or self._grid.last == self._drawn_step:
            return None
        return self._grid.last, self._draw(self._grid, self._drawn_time)

    def _draw(self, grid: LayerGrid, time: float) -> Picture:
        from ulysses_monitor.sinks.tensorboard.heat_map import draw

        # Noted first: a picture that cannot be drawn is not tried again at every step.
        self._drawn_step, self._drawn_time = grid.last, time
        return draw(grid)

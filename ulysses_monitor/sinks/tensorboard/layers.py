"""Layers by steps: the gradient norms so far in a grid that never grows past a picture's width."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["COLUMNS", "LayerGrid"]

COLUMNS = 400
"""Most columns; a column is then wider than a pixel, and no spike falls between two."""


class LayerGrid:
    """A value per layer and step; a column holds the largest of the `stride` steps it covers.

    Attributes:
        layers: the layers' numbers, ascending [L].
        first: step of the first column.
        last: last step that was added.
        stride: steps that a column covers; doubled whenever the columns run out.
    """

    def __init__(self, layers: tuple[int, ...], first: int) -> None:
        self.layers = layers
        self.first = first
        self.last = first - 1
        self.stride = 1
        self._cells = np.full((len(layers), COLUMNS), np.nan)

    @property
    def cells(self) -> npt.NDArray[np.float64]:
        """[L, columns so far]: NaN where nothing was recorded, infinite where it was not finite."""
        return self._cells[:, : (self.last - self.first) // self.stride + 1]

    def add(self, step: int, values: npt.NDArray[np.float64]) -> None:
        """Adds a step, not before `first`; what came after it is forgotten.

        The last step may be added again: writing it out may have failed the first time.
        """
        if step < self.last:
            self._cells[:, (step - self.first) // self.stride :] = np.nan
        while (column := (step - self.first) // self.stride) >= COLUMNS:
            self._halve()
        kept = np.where(np.isfinite(values), values, np.inf)
        self._cells[:, column] = np.fmax(self._cells[:, column], kept)
        self.last = step

    def _halve(self) -> None:
        merged = np.fmax(self._cells[:, ::2], self._cells[:, 1::2])
        self._cells[:, : COLUMNS // 2] = merged
        self._cells[:, COLUMNS // 2 :] = np.nan
        self.stride *= 2

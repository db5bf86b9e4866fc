"""Layers by steps, in few enough columns that a picture shows every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records.layers import Layer

__all__ = ["LayerGrid"]

Values = npt.NDArray[np.float64]


class LayerGrid:
    """One value per layer and step; a column holds the largest of the steps it covers.

    Choose `most_columns` so that a column is wider than a pixel; then no spike is lost between two.

    Args:
        layers: the layers, in order [L].
        first: step of the first column.
        spacing: steps between two recorded steps; more than 1 for a sampled metric.
        most_columns: limit on the number of columns, an even number.

    Attributes:
        layers: the layers, in order [L].
        first: step of the first column.
        last: last step that was added; `first - 1` before any.
        stride: steps that a column covers; it doubles whenever the columns run out.
        spacing: steps between two recorded steps.
    """

    def __init__(
        self, layers: tuple[Layer, ...], first: int, *, spacing: int = 1, most_columns: int
    ) -> None:
        self.layers = layers
        self.first = first
        self.last = first - 1
        self.stride = self.spacing = spacing
        self._cells = np.full((len(layers), most_columns), np.nan)

    @classmethod
    def from_table(
        cls,
        layers: tuple[Layer, ...],
        steps: npt.NDArray[np.int64],
        values: Values,
        *,
        most_columns: int,
    ) -> Self:
        """Makes the grid of a finished table; a NaN in it is a value that was not recorded.

        Args:
            layers: the layers, in order [L].
            steps: ascending [N], N > 0.
            values: [N, L]; infinite where the value was not finite.
            most_columns: limit on the number of columns, an even number.
        """
        first, last = int(steps[0]), int(steps[-1])
        spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
        grid = cls(layers, first, spacing=spacing, most_columns=most_columns)
        columns = (last - first) // spacing + 1
        grid.stride = spacing * -(-columns // most_columns)
        grid.last = last
        column = (steps - first) // grid.stride
        begins = np.flatnonzero(np.diff(column, prepend=-1))
        grid._cells[:, column[begins]] = np.fmax.reduceat(values, begins).T
        return grid

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """Joins the grids of some layers each, made from tables with the same steps."""
        layers = tuple(layer for grid in grids for layer in grid.layers)
        first = grids[0]
        cells = np.concatenate([grid._cells for grid in grids])
        joined = cls(layers, first.first, spacing=first.spacing, most_columns=cells.shape[1])
        joined.stride, joined.last, joined._cells = first.stride, first.last, cells
        return joined

    @property
    def cells(self) -> Values:
        """The columns so far [L, columns]: NaN where not recorded, infinite where not finite."""
        return self._cells[:, : (self.last - self.first) // self.stride + 1]

    @property
    def is_merged(self) -> bool:
        """Whether a column holds more than one recorded step."""
        return self.stride > self.spacing

    def add(self, step: int, values: Values) -> None:
        """Adds a recorded step and forgets the steps after it.

        The last step may be added again, because writing it out may have failed the first time.

        Args:
            step: not before `first`.
            values: [L]; a NaN counts as a value that is not finite.
        """
        if step < self.last:
            self._cells[:, (step - self.first) // self.stride :] = np.nan
        while (column := (step - self.first) // self.stride) >= self._cells.shape[1]:
            self._double_stride()
        kept = np.where(np.isfinite(values), values, np.inf)
        self._cells[:, column] = np.fmax(self._cells[:, column], kept)
        self.last = step

    def _double_stride(self) -> None:
        merged = np.fmax(self._cells[:, ::2], self._cells[:, 1::2])
        self._cells[:, : merged.shape[1]] = merged
        self._cells[:, merged.shape[1] :] = np.nan
        self.stride *= 2

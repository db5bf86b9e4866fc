from __future__ import annotations

import numpy as np
import pytest

from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.sinks.tensorboard.heat_map import draw


@pytest.mark.parametrize(
    "values", [np.zeros((1, 1)), np.full((2, 3), np.nan), np.ones((2, 3)), np.full((1, 2), 1e-300)]
)
def test_every_grid_can_be_drawn(values: np.ndarray) -> None:
    grid = LayerGrid(tuple(range(values.shape[0])), 1, most_columns=400)
    for step, column in enumerate(values.T, start=1):
        grid.add(step, column)
    assert draw(grid).png.startswith(b"\x89PNG")

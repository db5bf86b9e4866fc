from __future__ import annotations

import numpy as np
import pytest

from ulysses_monitor.sinks.tensorboard.heat_map import draw
from ulysses_monitor.sinks.tensorboard.layers import COLUMNS, LayerGrid


def grid_of(values: np.ndarray, first: int = 1) -> LayerGrid:
    grid = LayerGrid(tuple(range(values.shape[0])), first)
    for i, column in enumerate(values.T):
        grid.add(first + i, column)
    return grid


def test_a_short_run_is_kept_as_it_is() -> None:
    values = np.random.default_rng(0).random((3, 50))
    np.testing.assert_array_equal(grid_of(values, first=101).cells, values)


@pytest.mark.parametrize("steps", [COLUMNS + 1, 1000, 5001])
def test_a_long_run_keeps_every_peak_in_few_columns(steps: int) -> None:
    values = np.random.default_rng(0).random((4, steps))
    values[2, 777 % steps] = 50.0
    grid = grid_of(values)
    assert grid.cells.shape[1] <= COLUMNS
    padded = np.full((4, grid.cells.shape[1] * grid.stride), -np.inf)
    padded[:, :steps] = values
    expected = padded.reshape(4, -1, grid.stride).max(2)
    np.testing.assert_array_equal(grid.cells, expected)


def test_a_value_that_is_not_finite_stays_in_sight_when_columns_are_merged() -> None:
    values = np.ones((2, 3000))
    values[1, 1234] = np.nan
    cells = grid_of(values).cells
    assert np.isinf(cells[1]).sum() == 1
    assert np.isfinite(cells[0]).all()


def test_steps_that_were_not_recorded_are_empty() -> None:
    grid = LayerGrid((0,), 1)
    grid.add(1, np.array([1.0]))
    grid.add(4, np.array([2.0]))
    np.testing.assert_array_equal(grid.cells, [[1.0, np.nan, np.nan, 2.0]])


def test_steps_that_begin_again_replace_what_came_after() -> None:
    grid = grid_of(np.array([[1.0, 2.0, 3.0, 4.0]]))
    grid.add(2, np.array([9.0]))
    np.testing.assert_array_equal(grid.cells, [[1.0, 9.0]])


@pytest.mark.parametrize(
    "values", [np.zeros((1, 1)), np.full((2, 3), np.nan), np.ones((2, 3)), np.full((1, 2), 1e-300)]
)
def test_a_picture_is_drawn_of_whatever_there_is(values: np.ndarray) -> None:
    assert draw(grid_of(values)).png.startswith(b"\x89PNG")

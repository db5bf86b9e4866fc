from __future__ import annotations

import numpy as np
import pytest

from ulysses_monitor.records.layer_grid import LayerGrid

COLUMNS = 400


def grid_of(values: np.ndarray, first: int = 1) -> LayerGrid:
    grid = LayerGrid(tuple(range(values.shape[0])), first, most_columns=COLUMNS)
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
    grid = LayerGrid((0,), 1, most_columns=COLUMNS)
    grid.add(1, np.array([1.0]))
    grid.add(4, np.array([2.0]))
    np.testing.assert_array_equal(grid.cells, [[1.0, np.nan, np.nan, 2.0]])


def test_steps_that_begin_again_replace_what_came_after() -> None:
    grid = grid_of(np.array([[1.0, 2.0, 3.0, 4.0]]))
    grid.add(2, np.array([9.0]))
    np.testing.assert_array_equal(grid.cells, [[1.0, 9.0]])


@pytest.mark.parametrize("steps", [1, 50, COLUMNS, COLUMNS * 2, COLUMNS * 4])
def test_a_table_makes_the_same_grid_as_its_steps_one_by_one(steps: int) -> None:
    values = np.random.default_rng(0).random((3, steps))
    values[1, steps // 2] = np.inf
    one_by_one = grid_of(values, first=7)
    numbers = np.arange(7, 7 + steps)
    table = LayerGrid.from_table((0, 1, 2), numbers, values.T, most_columns=COLUMNS)
    np.testing.assert_array_equal(table.cells, one_by_one.cells)
    assert (table.first, table.last) == (one_by_one.first, one_by_one.last)
    assert (table.stride, table.is_merged) == (one_by_one.stride, one_by_one.is_merged)


def test_the_table_of_a_sampled_metric_has_a_column_for_each_sample() -> None:
    steps = np.arange(10, 110, 10)
    values = np.arange(10.0)[:, None]
    grid = LayerGrid.from_table((4,), steps, values, most_columns=10)
    np.testing.assert_array_equal(grid.cells, values.T)
    assert (grid.first, grid.stride, grid.is_merged) == (10, 10, False)
    grid = LayerGrid.from_table((4,), steps, values, most_columns=4)
    np.testing.assert_array_equal(grid.cells, [[2.0, 5.0, 8.0, 9.0]])
    assert (grid.stride, grid.is_merged) == (30, True)


def test_a_nan_in_a_table_was_not_recorded() -> None:
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.inf]])
    grid = LayerGrid.from_table((0, 1), np.array([1, 2, 3]), values, most_columns=4)
    np.testing.assert_array_equal(grid.cells, values.T)
    grid = LayerGrid.from_table((0, 1), np.array([1, 2, 3]), values, most_columns=2)
    np.testing.assert_array_equal(grid.cells, [[1.0, 3.0], [np.nan, np.inf]])

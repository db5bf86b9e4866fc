"""Downsampling keeps recorded rows only, loses no extreme, and stays within its budget."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.downsampling import keep_extremes
from ulysses_monitor.store import Block

NAN, INF = np.nan, np.inf


def block(values: object, present: object = None) -> Block:
    array = np.asarray(values, np.float32)
    array = array[:, None] if array.ndim == 1 else array
    names = tuple(f"train/m{i}/total" for i in range(array.shape[1]))
    rows = np.arange(len(array))
    given = np.ones(array.shape, bool) if present is None else np.asarray(present, bool)
    return Block(names, rows + 1, rows.astype(float), array, given)


def noise(rows: int, columns: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def test_all_rows_are_kept_if_they_fit() -> None:
    assert keep_extremes(block(noise(10)), 10).tolist() == list(range(10))
    assert keep_extremes(block(np.zeros((0, 3))), 5).tolist() == []


@pytest.mark.parametrize("points", [4, 5, 17, 100, 999])
@pytest.mark.parametrize("rows", [1000, 1001, 4097])
def test_the_rows_ascend_and_stay_within_the_budget(points: int, rows: int) -> None:
    kept = keep_extremes(block(noise(rows)), points)
    assert len(kept) <= points
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == rows - 1


@pytest.mark.parametrize("columns", [1, 3, 20])
def test_every_stretch_keeps_the_smallest_and_largest_of_each_metric(columns: int) -> None:
    values = noise(10_000, columns)
    points = 1000
    kept = set(keep_extremes(block(values), points).tolist())
    stretches = (points - 2) // (2 * columns)
    length = -(-len(values) // stretches)
    for begin in range(0, len(values), length):
        stretch = values[begin : begin + length]
        for column in stretch.T:
            assert begin + int(column.argmin()) in kept
            assert begin + int(column.argmax()) in kept


def test_most_of_the_budget_is_used() -> None:
    assert len(keep_extremes(block(noise(100_000)), 1000)) > 900


def test_a_single_spike_is_never_lost() -> None:
    for at in (1, 4999, 9998):
        values = np.zeros(10_000)
        values[at] = -1e-3
        assert at in keep_extremes(block(values), 10)


def test_a_value_that_was_not_measured_is_not_an_extreme() -> None:
    values = np.full((1000, 2), NAN, np.float32)
    values[::10, 0], values[37, 1] = noise(100)[:, 0], 5.0
    kept = keep_extremes(block(values, np.isfinite(values)), 20)
    assert 37 in kept
    assert set(kept[1:-1]) <= {37, *range(0, 1000, 10)}


def test_rows_with_a_measured_nan_or_inf_are_kept() -> None:
    values = noise(5000)[:, 0]
    nonfinite = [7, 1234, 1235, 4000]
    values[nonfinite] = [NAN, INF, -INF, NAN]
    assert set(nonfinite) <= set(keep_extremes(block(values), 20).tolist())


def test_many_nonfinite_rows_leave_half_of_the_budget_to_the_others() -> None:
    values = noise(5000)[:, 0]
    values[1000:4000] = NAN
    kept = keep_extremes(block(values), 100)
    assert len(kept) <= 100
    inside = [row for row in kept if 1000 <= row < 4000]
    assert len(inside) == 50
    assert inside[0] == 1000
    assert inside[-1] == 3999
    finite = np.where(np.isfinite(values), values, 0)
    assert {int(finite.argmin()), int(finite.argmax())} <= set(kept.tolist())


def test_a_metric_that_is_never_finite_is_accepted() -> None:
    kept = keep_extremes(block(np.full(1000, NAN)), 10)
    assert 2 <= len(kept) <= 10


def test_an_error_for_too_few_points_names_the_number_that_is_enough() -> None:
    with pytest.raises(InputError, match="points is 20; expected") as caught:
        keep_extremes(block(noise(1000, 50)), 20)
    enough = int(str(caught.value).split("expected ")[1].split()[0])
    assert len(keep_extremes(block(noise(1000, 50)), enough)) <= enough


@pytest.mark.parametrize("points", [1, 0, -3, True, 2.5, "10"])
def test_points_that_are_not_an_integer_of_2_or_more_are_refused(points: object) -> None:
    with pytest.raises(InputError, match="expected an integer of 2 or more"):
        keep_extremes(block(noise(10)), points)  # type: ignore[arg-type]


def test_a_million_rows_take_less_than_0_2_seconds() -> None:
    long = block(noise(1_000_000))
    taken = []
    for _ in range(3):
        begin = time.process_time()  # others may use the processor, too
        keep_extremes(long, 1000)
        taken.append(time.process_time() - begin)
    assert min(taken) < 0.2

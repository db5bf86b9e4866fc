"""A run read piece by piece is the run read whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ulysses_monitor as um
from tests.support.recorded import write_run
from ulysses_monitor.reading import chunks, find_last_step, read_columns, read_windows
from ulysses_monitor.records import StepRecord
from ulysses_monitor.store import Block, merge

NAN = float("nan")


@pytest.fixture(params=["parts", "compacted"])
def run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> um.RunReader:
    """Metrics of every step, sampled ones, a NaN, and steps 31 to 40 trained twice."""
    if request.param == "parts":
        monkeypatch.setattr("ulysses_monitor.store.sink.is_small", lambda _: False)
    items = []
    for i, step in enumerate([*range(1, 41), *range(31, 61)]):
        metrics = {f"a/a/{k}": 100.0 * i + k for k in range(7)} | {"odd/name/x[0]": 1.0 * i}
        if step % 10 == 0:
            metrics |= {"eval/loss/total": float(i), "odd/name/x0": 2.0}
        metrics["train/loss/total"] = NAN if step == 33 else float(i)
        items.append(StepRecord.of(step, float(i), metrics))
    return write_run(tmp_path / "run", items)


def assert_same(found: Block, expected: Block) -> None:
    assert sorted(found.names) == sorted(expected.names)
    order = [found.names.index(name) for name in expected.names]
    np.testing.assert_array_equal(found.steps, expected.steps)
    np.testing.assert_array_equal(found.times, expected.times)
    np.testing.assert_array_equal(found.values[:, order], expected.values)
    np.testing.assert_array_equal(found.present[:, order], expected.present)


@pytest.mark.parametrize("values", [1, 100, 250, 1 << 20])
@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_pieces_are_small_and_together_are_the_whole(
    run: um.RunReader, monkeypatch: pytest.MonkeyPatch, values: int, memory: int
) -> None:
    monkeypatch.setattr(chunks, "_VALUES", values)
    monkeypatch.setattr(chunks, "_MEMORY_BYTES", memory)
    whole, names = run.block(), run.names()
    columns = list(read_columns(run, names))
    assert_same(merge(columns), whole)
    windows = list(read_windows(run, names))
    assert_same(merge(windows), whole)
    assert all(block.names == tuple(names) for block in windows)
    assert all(block.values.size <= max(values, 60) for block in columns)
    if values < whole.values.size:
        assert all(block.values.size <= max(values, len(names)) for block in windows)


def test_steps_after_the_last_are_left_out(
    run: um.RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_VALUES", 100)
    found = merge(list(read_windows(run, run.names(), last=44)))
    assert_same(found, run.block(steps=(None, 44)))


def test_a_name_that_is_also_a_pattern_reads_only_itself(run: um.RunReader) -> None:
    (block,) = read_columns(run, ["odd/name/x[0]"])
    assert block.names == ("odd/name/x[0]",)
    assert len(block.steps) == 60


def test_the_last_step_is_that_of_the_metrics_asked_for(run: um.RunReader) -> None:
    assert find_last_step(run, run.names()) == 60
    assert find_last_step(run, []) is None


def test_nothing_is_read_of_no_metrics(run: um.RunReader) -> None:
    assert list(read_columns(run, [])) == []
    (block,) = read_windows(run, [])
    assert not len(block.steps)

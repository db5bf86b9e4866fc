"""`kill -9` at random instants: every run opens, the last second at most is missing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ulysses_monitor as um
from tests.monitor.store.killed_writer import METRICS, MOST_STEPS, values
from ulysses_monitor.store import compact

WRITER = Path(__file__).with_name("killed_writer.py")


def kill_one(run: Path, notes: Path, first: int, seconds: float) -> int:
    """Starts a writer, kills it, and checks what is there; the last step that is served."""
    np.memmap(notes, np.float64, "w+", shape=MOST_STEPS)[:] = np.inf
    child = subprocess.Popen(
        [sys.executable, WRITER, run, notes, str(first)],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(seconds)
        killed = time.monotonic()
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait(20)
    published = np.memmap(notes, np.float64, "r", shape=MOST_STEPS)
    due = first + np.flatnonzero(published <= killed - 1.0)
    return check(run, due)


def check(run: Path, due: np.ndarray) -> int:
    reader = um.open_run(run)
    assert reader.info["status"] == "crashed"
    frame = reader.metrics("a/a/*")
    assert reader.damaged == {}
    steps = frame.index.to_numpy()
    assert np.isin(due, steps).all()
    assert (np.diff(steps) == 1).all()  # nothing is missing in between, over all the kills
    columns = [int(name.rsplit("/", 1)[1]) for name in frame.columns]
    assert columns == list(range(METRICS)) or not len(steps)  # killed before its first step
    np.testing.assert_array_equal(frame.to_numpy(), steps[:, None] + values(0)[columns])
    alerts = reader.events("alert")
    if len(due):
        assert set(due[due % 7 == 0]) <= set(alerts["step"])
    if len(alerts):
        assert (alerts["at"] == alerts["step"]).all()
    evaluated = reader.metrics("eval/loss/total")
    assert (evaluated.to_numpy() == evaluated.index.to_numpy()[:, None]).all()
    return int(steps.max(initial=due.max(initial=0)))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("runs", "kills"), [(1, 6), pytest.param(10, 10, marks=pytest.mark.full)])
def test_a_run_that_is_killed_again_and_again_loses_at_most_one_second(
    tmp_path: Path, runs: int, kills: int
) -> None:
    generator = random.Random()
    for number in range(runs):
        run, first = tmp_path / str(number), 1
        for kill in range(kills):
            seconds = generator.uniform(0.0, 2.5)
            first = kill_one(run, tmp_path / "notes", first, seconds) + 1
            if kill % 4 == 3:
                compact(run / "metrics")
                check(run, np.zeros(0, np.int64))
        assert first > 100

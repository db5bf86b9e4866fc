"""A mirror copies a run to a URL during the training, where it can be read."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

import ulysses_monitor as um
from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.store import MirrorSink, RunDirectory, StoreSink, compact

SCHEMA = Schema(("a/a/a", "b/b/b"))


def record(step: int) -> StepRecord:
    return StepRecord(step, float(step), SCHEMA, np.array([step, 2.0 * step]))


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4()}/runs/demo"


def files(url: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(url)
    return sorted(f[len(path) :].strip("/") for f in filesystem.find(path))


def wait_until(is_true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_mirror_has_what_the_run_wrote_but_no_checkpoint(tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    directory = RunDirectory(run)
    directory.start({})
    store, mirror = StoreSink(directory, part_rows=4), MirrorSink(run, url, every_seconds=0)
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5/model.safetensors").write_text("large")
    (run / "model.safetensors").write_text("large")
    for step in range(1, 11):
        store.write(record(step))
        store.flush()
        mirror.flush()
        copied = um.open_run(url)
        assert copied.metrics().index.tolist() == list(range(1, step + 1))
    assert [f for f in files(url) if "safetensors" in f or ".lock" in f] == []
    assert len([f for f in files(url) if "_tail" in f]) == 1  # a sealed tail is removed there too
    store.close()
    directory.finish("finished")
    mirror.close()
    assert files(url) == ["events.jsonl", "metrics/metrics.parquet", "run.json"]
    assert um.open_run(url).info["status"] == "finished"
    assert um.open_run(url).metrics()["b/b/b"].tolist() == [2.0 * s for s in range(1, 11)]


def test_files_that_an_earlier_process_left_in_the_mirror_are_removed(
    tmp_path: Path, url: str
) -> None:
    run = tmp_path / "run"
    for first in (1, 4):
        directory = RunDirectory(run, "resume")
        directory.start({})
        store = StoreSink(directory)
        for step in range(first, first + 3):
            store.write(record(step))
        store.flush()
        MirrorSink(run, url).close()
        directory.release()
    compact(run / "metrics")
    MirrorSink(run, url).close()
    assert [f for f in files(url) if f.startswith("metrics/")] == ["metrics/metrics.parquet"]
    assert um.open_run(url).metrics().index.tolist() == [1, 2, 3, 4, 5, 6]


def train(monitor: um.Monitor, steps: int, between: Callable[[], None] = lambda: None) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.watch(model, optimizer):
        for _ in range(steps):
            loss = model(torch.ones(3, 4)).sum()
            loss.backward()
            monitor.observe(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
        between()


def test_a_monitor_mirrors_its_run_during_the_training(tmp_path: Path, url: str) -> None:
    def is_running() -> bool:
        with contextlib.suppress(um.InputError):  # `memory:` shows a file before all is written
            return "run.json" in files(url) and um.open_run(url).info["status"] == "running"
        return False

    def is_there() -> None:
        wait_until(is_running)

    train(um.Monitor(tmp_path / "run", tensorboard=False, mirror=url), 5, is_there)
    here, there = um.open_run(tmp_path / "run"), um.open_run(url)
    assert there.info == here.info
    assert there.metrics().equals(here.metrics())
    assert there.events().equals(here.events())


def test_a_mirror_that_cannot_be_written_loses_only_the_copy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    train(um.Monitor(tmp_path / "run", tensorboard=False, mirror=f"{tmp_path}/file/copy"), 5)
    assert um.open_run(tmp_path / "run").info["status"] == "finished"
    assert len(um.open_run(tmp_path / "run").metrics()) == 5
    assert "sink mirror failed" in caplog.text


@pytest.mark.parametrize("mirror", ["nosuch://bucket/run", "{run}"])
def test_an_invalid_mirror_is_refused_before_the_run(tmp_path: Path, mirror: str) -> None:
    mirror = mirror.format(run=tmp_path / "run")
    with pytest.raises(um.InputError, match=r"mirror|cannot be opened"):
        train(um.Monitor(tmp_path / "run", tensorboard=False, mirror=mirror), 1)
    assert not (tmp_path / "run").exists()


def test_a_mirror_that_holds_another_run_is_left_alone(tmp_path: Path, url: str) -> None:
    """After the loss of a machine, the copy is all there is."""
    train(um.Monitor(tmp_path / "run", tensorboard=False, mirror=url), 5)
    before = um.open_run(url).metrics()
    with pytest.raises(um.InputError, match=r"holds a run that .* does not continue"):
        train(um.Monitor(tmp_path / "elsewhere", tensorboard=False, mirror=url), 2)
    assert um.open_run(url).metrics().equals(before)
    resumed = um.Monitor(tmp_path / "run", tensorboard=False, mirror=url, if_exists="resume")
    train(resumed, 2)
    replaced = um.Monitor(tmp_path / "new", tensorboard=False, mirror=url, if_exists="overwrite")
    train(replaced, 3)
    assert len(um.open_run(url).metrics()) == 3


def test_copying_does_not_disturb_a_reader_of_a_local_mirror(tmp_path: Path) -> None:
    """A mapped file must not be truncated while it is rewritten."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    directory = RunDirectory(run)
    directory.start({})
    store = StoreSink(directory, part_rows=4)
    for step in range(1, 10):
        store.write(record(step))
    store.flush()
    MirrorSink(run, str(copy)).close()
    parts = {p.name: p.stat().st_ino for p in (copy / "metrics").iterdir()}
    MirrorSink(run, str(copy)).close()  # another process copies everything again
    again = {p.name: p.stat().st_ino for p in (copy / "metrics").iterdir()}
    assert parts.keys() == again.keys()
    assert all(
        parts[name] != again[name] for name in parts
    )  # new files; the old ones did not change
    directory.release()

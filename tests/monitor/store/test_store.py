"""The run store serves what was recorded, whatever happened to the writer."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ulysses_monitor as um
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.store import (
    Location,
    RunDirectory,
    StoreSink,
    check_available,
    compact,
    is_locked,
)

NAMES = ("train/loss/total", "grad/norm/total", "grad/norm/layer/0")
SCHEMA = Schema(NAMES)


def record(step: int, *, at: float = 0.0, scale: float = 1.0) -> StepRecord:
    values = scale * np.array([step, step / 2, step / 4], np.float64)
    return StepRecord(step, at + step, SCHEMA, values)


def open_store(path: Path, if_exists: Any = "refuse") -> tuple[RunDirectory, StoreSink]:
    directory = RunDirectory(path, if_exists)
    directory.start({"engine": "plain"})
    return directory, StoreSink(directory)


def write_run(path: Path, records: list[StepRecord], if_exists: Any = "refuse") -> None:
    directory, sink = open_store(path, if_exists)
    for item in records:
        sink.write(item)
    sink.flush()
    sink.close()
    directory.finish("finished")


def write_crashed_run(path: Path, records: list[StepRecord], if_exists: Any = "refuse") -> None:
    """Leaves what a killed writer leaves: open files, no compaction, a released lock."""
    directory, sink = open_store(path, if_exists)
    for item in records:
        sink.write(item)
    sink.flush()
    directory.release()


TAIL = "_tail-00000.arrows"


def write_flushed(path: Path, steps: range) -> None:
    """Writes each step by itself, as a slow run does."""
    directory, sink = open_store(path)
    for step in steps:
        sink.write(record(step))
        sink.flush()
    directory.release()


def files(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "metrics").iterdir())


# -- roundtrip --------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [write_run, write_crashed_run])
def test_values_come_back_with_nan_and_infinity(tmp_path: Path, writer: Any) -> None:
    values = np.array([[1.5, math.nan, math.inf], [-math.inf, 0.0, 1e-30]])
    records = [StepRecord(i + 1, float(i), SCHEMA, row) for i, row in enumerate(values)]
    writer(tmp_path / "run", records)
    frame = um.open_run(tmp_path / "run").metrics()
    assert list(frame.columns) == list(NAMES)
    assert frame.index.tolist() == [1, 2]
    np.testing.assert_allclose(frame.to_numpy(), values, rtol=1e-7)


@pytest.mark.parametrize("writer", [write_run, write_crashed_run])
def test_records_of_several_schemas_share_one_row_per_step(tmp_path: Path, writer: Any) -> None:
    sampled = Schema((*NAMES, "param/norm/total"))
    records = [record(1), record(2)]
    records[0] = StepRecord(1, 1.0, sampled, np.array([1.0, 0.5, 0.25, 7.0]))
    records.append(StepRecord.of(2, 2.5, {"eval/loss/total": 9.0}))
    writer(tmp_path / "run", records)
    frame = um.open_run(tmp_path / "run").metrics()
    assert frame.index.tolist() == [1, 2]
    np.testing.assert_array_equal(frame["train/loss/total"], [1.0, 2.0])
    np.testing.assert_array_equal(frame["param/norm/total"], [7.0, np.nan])
    np.testing.assert_array_equal(frame["eval/loss/total"], [np.nan, 9.0])


def test_a_live_run_is_readable_after_each_flush(tmp_path: Path) -> None:
    directory, sink = open_store(tmp_path / "run")
    for step in range(1, 6):
        sink.write(record(step))
        sink.flush()
        assert um.open_run(tmp_path / "run").metrics().index.tolist() == list(range(1, step + 1))
    assert um.open_run(tmp_path / "run").info["status"] == "running"
    sink.close()
    directory.finish("finished")
    assert um.open_run(tmp_path / "run").info["status"] == "finished"


# -- crashes ----------------------------------------------------------------------------------


def test_a_tail_truncated_at_any_byte_serves_its_complete_steps_and_nothing_else(
    tmp_path: Path,
) -> None:
    write_flushed(tmp_path / "run", range(1, 21))
    whole = (tmp_path / "run/metrics" / TAIL).read_bytes()
    truth = um.open_run(tmp_path / "run").metrics()
    assert len(truth) == 20
    lengths = []
    for cut in sorted({0, 1, 7, len(whole) - 1, *range(0, len(whole), len(whole) // 60)}):
        shutil.copytree(tmp_path / "run", tmp_path / "torn")
        (tmp_path / "torn/metrics" / TAIL).write_bytes(whole[:cut])
        served = um.open_run(tmp_path / "torn").metrics()
        lengths.append(len(served))
        if len(served):
            np.testing.assert_array_equal(served.to_numpy(), truth.head(len(served)).to_numpy())
            assert served.index.tolist() == list(range(1, len(served) + 1))
        shutil.rmtree(tmp_path / "torn")
    assert lengths == sorted(lengths)  # more bytes never serve fewer steps
    assert lengths[0] == 0
    assert lengths[-1] >= 19
    assert len(set(lengths)) > 15


def test_a_truncated_tail_is_compacted_to_its_complete_steps_when_the_run_resumes(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_flushed(run, range(1, 6))
    tail = run / "metrics" / TAIL
    tail.write_bytes(tail.read_bytes()[:-10])
    write_run(run, [record(step) for step in range(5, 8)], "resume")
    assert files(run) == ["metrics.parquet"]
    assert um.open_run(run).metrics()["train/loss/total"].tolist() == [1, 2, 3, 4, 5, 6, 7]


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from ulysses_monitor.bus import Bus
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink
directory = RunDirectory(Path(sys.argv[1]), "resume")
directory.start({})
bus = Bus([StoreSink(directory)])
schema = Schema(("a/a/a", "b/b/b"))
step = 0
while True:
    step += 1
    bus.publish(StepRecord(step, time.time(), schema, np.array([step, 2.0 * step])))
    if step % 5 == 0:
        data = {"message": "\\u00e9" * 50}
        bus.publish(Event(kind="alert", step=step, time=time.time(), data=data))
    if step == 20:
        print("ready", flush=True)
    time.sleep(0.001)
"""


@pytest.mark.timeout(120)
def test_a_killed_writer_leaves_a_readable_run_and_an_unlocked_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(InputError, match="in use by a running training"):
            RunDirectory(run, "resume")
        with pytest.raises(InputError, match="in use by a running training"):
            check_available(run, "overwrite")
        time.sleep(1.5)
        killed = time.time()
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    finally:
        child.kill()
    reader = um.open_run(run)
    assert reader.info["status"] == "crashed"
    frame = reader.metrics()
    assert killed - reader.times().max() < 1.0
    assert frame.index.tolist() == list(range(1, len(frame) + 1))
    np.testing.assert_array_equal(frame["b/b/b"], 2.0 * frame["a/a/a"])
    assert len(reader.events("alert")) >= 4
    RunDirectory(run, "resume").release()


# -- resuming ---------------------------------------------------------------------------------


def test_a_step_trained_twice_is_served_from_the_later_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_crashed_run(run, [record(step) for step in range(1, 9)])
    write_crashed_run(run, [record(s, at=100, scale=10) for s in range(5, 8)], "resume")
    expected = [1, 2, 3, 4, 50, 60, 70, 8]
    assert um.open_run(run).metrics()["train/loss/total"].tolist() == expected
    compact(run / "metrics")
    assert um.open_run(run).metrics()["train/loss/total"].tolist() == expected


@pytest.mark.parametrize("compacted", [False, True])
def test_a_later_nan_is_not_hidden_behind_an_earlier_number(
    tmp_path: Path, compacted: bool
) -> None:
    run = tmp_path / "run"
    write_crashed_run(run, [record(step) for step in range(1, 4)])
    later = StepRecord(3, 100.0, SCHEMA, np.array([math.nan, 5.0, 5.0]))
    (write_run if compacted else write_crashed_run)(run, [later], "resume")
    loss = um.open_run(run).metrics()["train/loss/total"]
    assert loss.tolist()[:2] == [1, 2]
    assert math.isnan(loss.loc[3])


def test_a_resumed_run_keeps_its_starts_and_its_events(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, if_exists in enumerate(("refuse", "resume")):
        directory, sink = open_store(run, if_exists)
        sink.write(Event(kind="start", step=number, time=0.0))
        sink.close()
        directory.finish("finished")
    assert len(um.open_run(run).info["starts"]) == 2
    assert um.open_run(run).events("start")["step"].tolist() == [0, 1]


def test_an_incomplete_line_of_a_killed_writer_does_not_damage_the_next_event(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_crashed_run(run, [])
    line = '{"kind": "alert", "step": 3, "message": "é"}\n'.encode()
    (run / "events.jsonl").write_bytes(line + line[:-6])  # ends in the middle of a letter
    directory, sink = open_store(run, "resume")
    sink.write(Event(kind="start", step=3, time=0.0))
    sink.close()
    directory.finish("finished")
    assert um.open_run(run).events()["kind"].tolist() == ["alert", "start"]


# -- compaction -------------------------------------------------------------------------------


def test_compaction_keeps_every_value_and_is_idempotent(tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluation = StepRecord.of(2, 2.5, {"eval/loss/total": 9.0})
    write_crashed_run(run, [*(record(step) for step in range(1, 6)), evaluation])
    before = um.open_run(run).metrics()
    compact(run / "metrics")
    assert files(run) == ["metrics.parquet"]
    first = (run / "metrics/metrics.parquet").read_bytes()
    compact(run / "metrics")
    assert (run / "metrics/metrics.parquet").read_bytes() == first
    after = um.open_run(run).metrics()
    np.testing.assert_array_equal(before.to_numpy(), after[before.columns].to_numpy())
    assert after.index.tolist() == before.index.tolist()


def test_a_compaction_interrupted_before_it_removed_the_parts_is_repeated_safely(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_crashed_run(run, [record(step) for step in range(1, 4)])
    write_crashed_run(run, [record(s, at=100, scale=10) for s in (2, 3)], "resume")
    parts = {p.name: p.read_bytes() for p in (run / "metrics").iterdir()}
    compact(run / "metrics")
    for keep in (["_tail-00000.arrows", "_tail-00001.arrows"], ["_tail-00001.arrows"]):
        for name in keep:
            (run / "metrics" / name).write_bytes(parts[name])
        (run / "metrics/.metrics.parquet.tmp").write_bytes(b"half a file")
        assert um.open_run(run).metrics()["train/loss/total"].tolist() == [1, 20, 30]
        compact(run / "metrics")
        assert um.open_run(run).metrics()["train/loss/total"].tolist() == [1, 20, 30]


def test_a_reader_during_a_compaction_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removes the parts between the reader's listing and its reading."""
    run = tmp_path / "run"
    write_crashed_run(run, [record(step) for step in range(1, 4)])
    listing, calls = Location.children, []

    def children(self: Location) -> list[str]:
        found = listing(self)
        calls.append(found)
        if len(calls) == 2:  # after the second listing, which equals the first
            compact(run / "metrics")
        return found

    monkeypatch.setattr(Location, "children", children)
    assert um.open_run(run).metrics().index.tolist() == [1, 2, 3]
    assert files(run) == ["metrics.parquet"]


# -- who may write ----------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_releases_the_directory(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run", "refuse")
    assert is_locked(tmp_path / "run")
    for if_exists in ("refuse", "resume", "overwrite"):
        with pytest.raises(InputError, match="in use by a running training"):
            RunDirectory(tmp_path / "run", if_exists)  # type: ignore[arg-type]
    first.release()
    assert not is_locked(tmp_path / "run")
    RunDirectory(tmp_path / "run", "refuse").release()


def test_an_existing_run_is_refused_unless_resumed_or_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, [record(1)])
    with pytest.raises(InputError, match="already holds a run"):
        RunDirectory(run)
    assert not is_locked(run)
    write_run(run, [record(2)], "resume")
    assert um.open_run(run).metrics().index.tolist() == [1, 2]
    write_run(run, [record(3)], "overwrite")
    assert um.open_run(run).metrics().index.tolist() == [3]


def test_overwriting_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, [record(1)])
    (run / "tensorboard").mkdir()
    (run / "tensorboard/old").touch()
    (run / "report.html").touch()
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5/model.safetensors").write_text("weights")
    (run / "notes.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    RunDirectory(run, "overwrite").release()
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "checkpoint-5/model.safetensors").read_text() == "weights"
    assert not (run / "tensorboard").exists()
    assert not (run / "report.html").exists()
    assert not (run / "run.json").exists()
    shutil.rmtree(run / "metrics")
    (run / "metrics").symlink_to(elsewhere)
    RunDirectory(run, "overwrite").release()
    assert (elsewhere / "kept").exists()  # removes a link, keeps its target


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="is a file"):
        check_available(tmp_path / "run", "overwrite")


def test_a_forked_child_does_not_keep_the_directory_locked(tmp_path: Path) -> None:
    """Data loader workers, for example, may outlive the training."""
    directory = RunDirectory(tmp_path / "run")
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        assert is_locked(tmp_path / "run")
        directory.release()
        assert not is_locked(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# -- secrets ----------------------------------------------------------------------------------


def test_secrets_are_masked_in_run_json_and_in_events_at_any_depth(tmp_path: Path) -> None:
    config = {
        "hub_token": "hf_abc",
        "nested": [{"API_KEY": "sk-abc", "webhook_url": "https://abc"}],
        "api_keys": ["sk-abc"],
        "credentials": {"user": "abc", "port": 443},
        "tokenizer_name": "llama",
        "tokenized_path": "data/cache",
        "max_tokens": 512,
        "empty_token": "",
    }
    directory = RunDirectory(tmp_path / "run")
    directory.start({"config": config})
    sink = StoreSink(directory)
    sink.write(Event(kind="start", step=0, time=0.0, data={"password": "abc", "config": config}))
    sink.close()
    directory.finish("finished")
    written = (tmp_path / "run/run.json").read_text() + (tmp_path / "run/events.jsonl").read_text()
    assert "abc" not in written
    masked = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert masked["hub_token"] == "***"  # noqa: S105 - it is masked
    assert masked["credentials"] == {"user": "***", "port": 443}
    assert (masked["max_tokens"], masked["empty_token"]) == (512, "")
    assert (masked["tokenizer_name"], masked["tokenized_path"]) == ("llama", "data/cache")


def test_a_closed_run_directory_can_be_moved(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [record(1)])
    os.rename(tmp_path / "run", tmp_path / "moved")  # noqa: PTH104
    assert len(um.open_run(tmp_path / "moved").metrics()) == 1

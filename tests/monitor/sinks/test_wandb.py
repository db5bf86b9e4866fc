"""Reads offline W&B runs back from their transaction log, record by record."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.sinks.sink_items import (
    HOSTILE,
    NOT_FINITE,
    alert,
    deliver,
    hostile,
    many,
    on_a_thread,
    record,
    stop,
    wait_for,
)
from tests.support.ports import free_port
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.wandb import WandbSink

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

BLOCK, HEADER = 32768, 7


@pytest.fixture(autouse=True)
def _no_service_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    import wandb

    wandb.teardown()


def offline(folder: Path, config: Any = None, **more: Any) -> WandbSink:
    sink = WandbSink(mode="offline", **more)
    folder.mkdir(parents=True, exist_ok=True)
    sink.open(folder, {"config": config or {}})
    return sink


def read_back(folder: Path) -> list[Any]:
    """Returns the records of the run in `folder`, once W&B's process has written the last one."""

    def whole() -> list[Any]:
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        found = parse(path.read_bytes())
        return found if found and found[-1].HasField("exit") else []

    return wait_for(whole)


def parse(data: bytes) -> list[Any]:
    """Reads the records of a transaction log: protobufs in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    position, pending, found = HEADER, b"", []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER
        pending += data[position : position + length]
        position += length
        if kind in (1, 4):  # complete, or the last piece
            found.append(Record.FromString(pending))
            pending = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    return [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in read_back(folder)
        if r.HasField("history")
    ]


def test_records_are_rows_with_the_step_as_their_axis(tmp_path: Path) -> None:
    evaluation = StepRecord.of(2, 0.0, {"eval/loss/total": 2.5})
    sink = offline(tmp_path / "demo", project="p", entity="e")
    deliver(sink, [record(1), record(2), evaluation, stop(2, "finished")])
    rows = history(tmp_path / "demo")
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert [row.get("train/loss/total") for row in rows] == [3.0, 1.5, None]
    assert rows[2]["eval/loss/total"] == 2.5
    assert "grad/norm/param/layers.0.weight" not in rows[0]
    records = read_back(tmp_path / "demo")
    (run,) = [r.run for r in records if r.HasField("run")]
    assert (run.project, run.entity, run.display_name) == ("p", "e", "demo")
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["*"] == "step"


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), (None, 1)])
def test_the_wandb_run_ends_with_the_status_of_the_training(
    tmp_path: Path, status: str | None, code: int
) -> None:
    deliver(offline(tmp_path), [record(1), *([stop(1, status)] if status else [])])
    (exit_,) = [r.exit for r in read_back(tmp_path) if r.HasField("exit")]
    assert exit_.exit_code == code


def test_alerts_become_wandb_alerts(tmp_path: Path) -> None:
    deliver(offline(tmp_path), [alert(3)])
    (found,) = [r.alert for r in read_back(tmp_path) if r.HasField("alert")]
    assert (found.title, found.text, found.level) == ("spike", "step 3: It broke.", "ERROR")


def test_nan_and_inf_are_kept(tmp_path: Path) -> None:
    deliver(offline(tmp_path), [StepRecord.of(1, 0.0, NOT_FINITE)])
    values = [float(history(tmp_path)[0][name]) for name in NOT_FINITE]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 0.5]


def test_hostile_names_are_kept(tmp_path: Path) -> None:
    items = [hostile(), record(2), alert(2, rule='"<script>\n\ud800' * 20)]
    deliver(offline(tmp_path, {"odd <name>\n": "\ud800"}), items)
    rows = history(tmp_path)
    assert len(rows) == 2
    for name in ('grad/norm/layer/"quoted"', "grad/norm/layer/größe-层-🙂"):
        assert rows[0][name] == float(HOSTILE.index(name))
    own = {"step", "_step", "_runtime", "_timestamp"}
    assert len(rows[0].keys() - own) == len(HOSTILE) - 1  # W&B drops an empty name


def test_thousands_of_metrics_are_kept(tmp_path: Path) -> None:
    deliver(offline(tmp_path), [many(step, 3000) for step in (1, 2)])
    rows = history(tmp_path)
    assert [sum(name.startswith("m/v/") for name in row) for row in rows] == [3000, 3000]


def test_the_config_is_the_users_with_secrets_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish-0123")
    monkeypatch.setenv("WANDB_API_KEY", "a1b2" * 10)
    config = {"lr": 1e-4, "lora": {"rank": 8}, "hf_token": "s3cr3t", "nan": math.nan}
    deliver(offline(tmp_path, config), [record(1), alert(1, message="refused: swordfish-0123")])
    (run,) = [r.run for r in read_back(tmp_path) if r.HasField("run")]
    kept = {u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"}
    assert kept == {"lr": 1e-4, "lora": {"rank": 8}, "hf_token": "***", "nan": "nan"}
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for secret in (b"s3cr3t", b"swordfish", b"a1b2" * 10):
        assert secret not in everything


def test_nothing_but_metrics_is_captured(tmp_path: Path) -> None:
    def work() -> None:
        sink = offline(tmp_path)
        sink.write(record(1))
        print("not for W&B")  # noqa: T201
        sink.close()

    on_a_thread(work)
    files = {p.name for p in tmp_path.rglob("files/*")}
    assert not files & {"output.log", "requirements.txt", "wandb-metadata.json", "diff.patch"}
    kinds = {r.WhichOneof("record_type") for r in read_back(tmp_path)}
    assert not kinds & {"output", "output_raw", "stats", "environment"}
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"not for W&B" not in everything
    assert str(Path(__file__)).encode() not in everything


def test_starting_a_run_leaves_the_process_unchanged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def state() -> list[Any]:
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        return [sys.exit, sys.excepthook, threading.excepthook, sys.stdout, handlers]

    before, environment = state(), dict(os.environ)
    deliver(offline(tmp_path), [record(1)])
    assert state() == before
    assert dict(os.environ) == environment
    import wandb

    assert wandb.run is None
    assert capfd.readouterr() == ("", "")


def test_the_users_own_wandb_run_continues(tmp_path: Path) -> None:
    import wandb

    own = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    deliver(offline(tmp_path / "ours"), [record(1)])
    own.log({"mine": 1})
    own.finish()
    assert "mine" not in history(tmp_path / "ours")[0]
    assert any("mine" in row for row in history(tmp_path))


def test_a_closed_sink_starts_another_run(tmp_path: Path) -> None:
    sink = offline(tmp_path / "a")
    deliver(sink, [record(1)])
    (tmp_path / "b").mkdir()
    sink.open(tmp_path / "b", {})
    deliver(sink, [record(2)])
    assert [row["step"] for row in history(tmp_path / "a")] == [1]
    assert [row["step"] for row in history(tmp_path / "b")] == [2]


def test_an_unwritable_folder_is_an_error_until_another_one_is_given(
    tmp_path: Path,
) -> None:
    sink = WandbSink(mode="offline")
    (tmp_path / "blocked").write_text("in the way")
    sink.open(tmp_path / "blocked", {})
    with pytest.raises(OSError, match="blocked"):
        on_a_thread(lambda: sink.write(record(1)))
    sink.open(tmp_path, {})
    deliver(sink, [record(2)])
    assert [row["step"] for row in history(tmp_path)] == [2]


def test_an_unreachable_server_raises_in_time_and_the_sink_can_be_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "a1b2" * 10)
    sink = WandbSink(mode="online", timeout=2.0)
    sink.open(tmp_path, {})
    for _ in range(2):
        with pytest.raises(ConnectionError) as failure:
            on_a_thread(lambda: sink.write(record(1)))
        assert "a1b2" not in str(failure.value)
    on_a_thread(sink.close)


def test_without_an_account_an_online_run_is_refused_immediately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        InputError, match="no W&B account was found; run `wandb login`, set WANDB_API_KEY"
    ):
        WandbSink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbSink()

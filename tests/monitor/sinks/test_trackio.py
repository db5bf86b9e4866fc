"""What the Trackio sink hands to Trackio; `tests/install/test_trackio.py` uses the real one."""

from __future__ import annotations

import sqlite3
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.sinks.sink_items import alert, record, stop
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.sinks import make_sinks
from ulysses_monitor.sinks.trackio import TrackioSink

Call = tuple[str, str, dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the stand-in's storage is called with."""
    found: list[Call] = []

    class SQLiteStorage:
        @staticmethod
        def bulk_log(project: str, **more: Any) -> None:
            if more["steps"] == [13]:
                raise sqlite3.OperationalError("database is locked")
            found.append(("log", project, more))

        @staticmethod
        def bulk_alert(project: str, **more: Any) -> None:
            found.append(("alert", project, more))

    package = types.ModuleType("trackio")
    storage = types.ModuleType("trackio.sqlite_storage")
    storage.SQLiteStorage = SQLiteStorage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", storage)
    monkeypatch.setattr("ulysses_monitor.sinks.trackio.require_library", lambda *_: None)
    return found


def test_records_and_alerts_go_to_the_run_with_the_config_once(calls: list[Call]) -> None:
    (sink,) = make_sinks([{"trackio": {"project": "p"}}])
    assert isinstance(sink, TrackioSink)
    sink.open(Path("runs/demo"), {"config": {"lr": 0.1, "api_token": "s3cr3t"}})
    for item in (record(1), record(2), alert(2), stop(2, "finished")):
        sink.write(item)
    first, second, third = (more for _, _, more in calls)
    assert {(kind, project) for kind, project, _ in calls} == {("log", "p"), ("alert", "p")}
    assert first["metrics_list"] == [{"train/loss/total": 3.0, "grad/norm/layer/0": 0.5}]
    assert (first["steps"], first["run"]) == ([1], "demo")
    assert first["timestamps"] == ["2023-11-14T22:13:21.250000+00:00"]
    config = {"lr": 0.1, "api_token": "***", "_Created": first["timestamps"][0]}
    assert (first["config"], second["config"]) == (config, None)
    assert (third["titles"], third["levels"]) == (["spike"], ["error"])
    assert first["run_id"] == second["run_id"] == third["run_id"]


def test_each_start_is_a_run_of_its_own(calls: list[Call]) -> None:
    sink = TrackioSink()
    for _ in range(2):
        sink.open(Path("runs/demo"), {})
        sink.write(record(1))
    assert calls[0][2]["run_id"] != calls[1][2]["run_id"]
    assert calls[0][2]["config"].keys() == calls[1][2]["config"].keys() == {"_Created"}


def test_a_locked_database_is_tried_again(calls: list[Call]) -> None:
    sink = TrackioSink()
    sink.open(Path("demo"), {})
    with pytest.raises(OSError, match="sink trackio: database is locked"):
        sink.write(record(13))
    sink.write(record(14))
    assert calls[0][2]["config"] is not None  # not lost with the record that failed


def test_without_trackio_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"pip install 'ulysses-toolkit\[trackio\]'"):
        TrackioSink()

"""Sinks are named in YAML or given as objects; errors come before the training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks import MemorySink, check_sinks, make_sinks
from ulysses_monitor.sinks.csv_file import CsvSink
from ulysses_monitor.sinks.jsonl import JsonlSink

OPTIONAL = {
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "prometheus": "prometheus_client",
    "opentelemetry": "opentelemetry.exporter.otlp.proto.http",
}


class OwnSink(MemorySink):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size


class NoSink:
    pass


def test_objects_names_arguments_and_import_paths_all_make_sinks(tmp_path: Path) -> None:
    given = MemorySink()
    first, second, third, fourth, fifth = make_sinks(
        [
            given,
            "jsonl",
            {"csv": {"path": str(tmp_path / "a.csv")}},
            f"{__name__}:OwnSink",
            {f"{__name__}:OwnSink": {"size": 5}},
        ]
    )
    assert first is given
    assert isinstance(second, JsonlSink)
    assert isinstance(third, CsvSink)
    assert (fourth.size, fifth.size) == (3, 5)  # type: ignore[attr-defined]


def test_making_sinks_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_sinks(["console", "csv", "jsonl", "memory"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["jsonl", {"jsonl": None}, {"jsonl": {}}])
def test_a_sink_without_arguments_can_be_written_in_several_ways(spec: Any) -> None:
    assert isinstance(make_sinks([spec])[0], JsonlSink)


def test_an_object_with_the_three_methods_is_a_sink() -> None:
    class Mine:
        def write(self, item: StepRecord | Event) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

    mine = Mine()
    assert make_sinks([mine]) == [mine]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsnl", r"sinks: 'jsnl' is not a sink \(did you mean 'jsonl'\?\); allowed: console, csv"),
        ({"wandbb": {}}, r"did you mean 'wandb'"),
        ("a b:C", "is not a sink; allowed: "),
        ("module:", "is not a sink"),
        ("os; import:x", "is not a sink"),
        ({}, "a mapping has the keys none; expected one sink's name"),
        ({"csv": {}, "jsonl": {}}, "a mapping has the keys csv, jsonl"),
        ({"csv": "here.csv"}, "sink csv: got str; expected a mapping of settings to values"),
        ({"csv": {1: 2}}, "sink csv: got dict; expected a mapping of settings"),
        (
            {"csv": {"pth": "x"}},
            r"sink csv: unknown setting 'pth' \(did you mean 'path'\?\); allowed: path, metrics",
        ),
        ({"csv": {"path": 3}}, "sink csv: path is 3; expected a path"),
        ({"webhook": {}}, "sink webhook: the setting url_env is missing; allowed: url_env, kinds"),
        (3, "sinks: an object of type int is not a sink; expected an object with write, flush"),
        (object(), "sinks: an object of type object is not a sink"),
        (MemorySink, r"sink MemorySink: is a class; expected an object, MemorySink\(...\)"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec: Any, message: str) -> None:
    for check in make_sinks, check_sinks:
        with pytest.raises(InputError, match=message) as refused:
            check([spec])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("specs", ["csv", {"csv": {}}, None, 3])
def test_something_other_than_a_list_is_refused(specs: Any) -> None:
    with pytest.raises(InputError, match=r"expected a list of sinks, such as \[console\]"):
        make_sinks(specs)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Sink", "cannot be imported: No module named 'no_such_module'"),
        (f"{__name__}:Missing", f"{__name__} has no Missing"),
        (f"{__name__}:NoSink", "an object of type NoSink is not a sink"),
        (f"{__name__}:HOSTILE_NUMBER", "an object of type int is not a sink"),
    ],
)
def test_a_users_class_is_loaded_when_the_sink_is_made_and_not_by_a_check(
    path: str, message: str
) -> None:
    check_sinks([path])
    with pytest.raises(InputError, match=message):
        make_sinks([path])


HOSTILE_NUMBER = 3


def test_a_check_does_not_import_a_users_class(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sinks(["this_is_not_imported:Sink"])
    assert "this_is_not_imported" not in sys.modules


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_library_is_reported_with_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, OPTIONAL[name], None)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=rf"pip install 'ulysses-toolkit\[{name}\]'"):
        make_sinks([name])


def test_arguments_that_may_be_secret_are_not_repeated() -> None:
    with pytest.raises(InputError) as refused:
        make_sinks([{"webhook": {"url": "https://hooks.example.org/s3cr3t"}}])
    assert "s3cr3t" not in str(refused.value)
    assert "allowed: url_env" in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"prometheus": {"port": 70000}}, "port is 70000; expected an integer from 0 to 65,535"),
        ({"prometheus": {"port": True}}, "port is True"),
        ({"prometheus": {"host": ""}}, "host is ''; expected text"),
        (
            {"opentelemetry": {"endpoint": "localhost:4318"}},
            r"endpoint is .*; expected http\(s\)://host:port",
        ),
        ({"opentelemetry": {"endpoint": "http://u:s3cr3t@h"}}, "OTEL_EXPORTER_OTLP_HEADERS"),
        ({"opentelemetry": {"timeout": 0}}, "timeout is 0; expected a number from 0.1 to 600"),
        ({"mlflow": {"tracking_uri": "http://u:s3cr3t@h"}}, "MLFLOW_TRACKING_USERNAME"),
        ({"mlflow": {}}, "tracking_uri is missing, and MLFLOW_TRACKING_URI is not set"),
        ({"wandb": {"mode": "sometimes"}}, "mode is 'sometimes'; allowed: online, offline"),
        ({"wandb": {"project": 3}}, "project is 3; expected text"),
    ],
)
def test_values_are_checked_before_the_library(
    spec: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for library in OPTIONAL.values():
        monkeypatch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message) as refused:
        make_sinks([spec])
    assert "s3cr3t" not in str(refused.value)

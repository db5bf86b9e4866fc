"""Sinks are named in a YAML, or given as objects; what is wrong is said before the training."""

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


def test_a_users_object_with_the_three_methods_is_a_sink() -> None:
    class Mine:
        def write(self, item: StepRecord | Event) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

    mine = Mine()
    assert make_sinks([mine]) == [mine]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsnl", r"sinks: 'jsnl' is no sink \(did you mean 'jsonl'\?\); allowed are console, csv"),
        ({"wandbb": {}}, r"did you mean 'wandb'"),
        ("a b:C", "is no sink; allowed are"),
        ("module:", "is no sink"),
        ("os; import:x", "is no sink"),
        ({}, "a mapping with the keys none; allowed is one sink's name"),
        ({"csv": {}, "jsonl": {}}, "a mapping with the keys csv, jsonl"),
        ({"csv": "here.csv"}, "sink csv: got str; allowed is a mapping of arguments to values"),
        ({"csv": {1: 2}}, "sink csv: got dict; allowed is a mapping of arguments"),
        (
            {"csv": {"pth": "x"}},
            r"sink csv: .*'pth' \(did you mean 'path'\?\); allowed arguments: "
            r"path: .*, metrics: ",
        ),
        ({"csv": {"path": 3}}, "sink csv: path: got 3; allowed is text"),
        ({"webhook": {}}, "sink webhook: missing a required argument: 'url_env'; allowed"),
        (3, "sink int has no write, flush and close methods"),
        (object(), "sink object has no write, flush and close methods"),
        (MemorySink, "sink MemorySink is a class; allowed is an object of it"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec: Any, message: str) -> None:
    for check in make_sinks, check_sinks:
        with pytest.raises(InputError, match=message) as refused:
            check([spec])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("specs", ["csv", {"csv": {}}, None, 3])
def test_something_other_than_a_list_is_refused(specs: Any) -> None:
    with pytest.raises(InputError, match=r"allowed is a list such as \[csv\]"):
        make_sinks(specs)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Sink", "cannot be imported: No module named 'no_such_module'"),
        (f"{__name__}:Missing", "test_specs has no Missing"),
        (f"{__name__}:NoSink", "sink NoSink has no write, flush and close methods"),
        (f"{__name__}:HOSTILE_NUMBER", "is no class"),
    ],
)
def test_a_users_class_that_is_not_there_is_refused_when_it_is_made_not_before(
    path: str, message: str
) -> None:
    check_sinks([path])
    with pytest.raises(InputError, match=message):
        make_sinks([path])


HOSTILE_NUMBER = 3


def test_a_users_class_is_not_imported_by_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sinks(["this_is_not_imported:Sink"])
    assert "this_is_not_imported" not in sys.modules


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_library_is_said_with_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, OPTIONAL[name], None)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=rf"pip install 'ulysses-toolkit\[{name}\]'"):
        make_sinks([name])


def test_arguments_are_not_repeated_where_they_could_be_secrets() -> None:
    with pytest.raises(InputError) as refused:
        make_sinks([{"webhook": {"url": "https://hooks.example.org/s3cr3t"}}])
    assert "s3cr3t" not in str(refused.value)
    assert "allowed arguments: url_env" in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"prometheus": {"port": 70000}}, "port: got 70000; allowed is a whole number from 0"),
        ({"prometheus": {"port": True}}, "port: got True"),
        ({"prometheus": {"host": ""}}, "host: got ''; allowed is text"),
        ({"opentelemetry": {"endpoint": "localhost:4318"}}, "allowed is http"),
        ({"opentelemetry": {"endpoint": "http://u:s3cr3t@h"}}, "OTEL_EXPORTER_OTLP_HEADERS"),
        ({"opentelemetry": {"timeout": 0}}, "timeout: got 0"),
        ({"mlflow": {"tracking_uri": "http://u:s3cr3t@h"}}, "MLFLOW_TRACKING_USERNAME"),
        ({"mlflow": {}}, "tracking_uri: not given, and MLFLOW_TRACKING_URI is not set"),
        ({"wandb": {"mode": "sometimes"}}, "mode: got 'sometimes'; allowed is online, offline"),
        ({"wandb": {"project": 3}}, "project: got 3"),
    ],
)
def test_values_are_checked_before_the_library_is_looked_for(
    spec: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for library in OPTIONAL.values():
        monkeypatch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message) as refused:
        make_sinks([spec])
    assert "s3cr3t" not in str(refused.value)

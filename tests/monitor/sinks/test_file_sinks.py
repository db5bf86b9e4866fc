"""Other programs read JSONL and CSV files back completely, whatever names and values they have."""

from __future__ import annotations

import csv
import json
import resource
import signal
from pathlib import Path
from typing import Any

import pandas as pd
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
)
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.csv_file import CsvSink
from ulysses_monitor.sinks.jsonl import JsonlSink

BOTH = pytest.mark.parametrize("kind", [JsonlSink, CsvSink])


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_each_json_line_is_a_record_or_an_event(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deliver(JsonlSink(path), [record(1), alert(1)])
    first, second = lines(path)
    assert (first["step"], first["time"]) == (1, 1_700_000_001.25)
    assert first["metrics"] == record(1).to_dict()
    assert (second["kind"], second["rule"], second["message"]) == ("alert", "spike", "It broke.")


def test_csv_has_a_row_for_each_metric_and_accepts_a_growing_schema(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    deliver(CsvSink(path), [record(1), alert(1), record(2, eval__loss__total=1.5)])
    table = pd.read_csv(path)
    assert list(table) == ["step", "time", "metric", "value"]
    wide = table.pivot_table(index="step", columns="metric", values="value")
    assert wide.loc[2, "eval/loss/total"] == 1.5
    assert wide.loc[2, "train/loss/total"] == 1.5
    assert len(table) == 4 + 5


def test_json_has_nan_and_inf_as_text_that_every_reader_accepts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deliver(JsonlSink(path), [StepRecord.of(1, 0.0, NOT_FINITE)])
    assert list(lines(path)[0]["metrics"].values()) == ["nan", "inf", "-inf", 0.5]


def test_nonfinite_csv_values_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    deliver(CsvSink(path), [StepRecord.of(1, 0.0, NOT_FINITE)])
    assert [str(float(row[3])) for row in rows(path)[1:]] == ["nan", "inf", "-inf", "0.5"]


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    item = StepRecord.of(1, 0.0, {"a/b/total": value})
    deliver(JsonlSink(tmp_path / "a.jsonl"), [item])
    deliver(CsvSink(tmp_path / "a.csv"), [item])
    assert lines(tmp_path / "a.jsonl")[0]["metrics"]["a/b/total"] == value
    assert float(rows(tmp_path / "a.csv")[1][3]) == value


def test_hostile_names_stay_on_one_json_line_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deliver(JsonlSink(path), [hostile()])
    (line,) = path.read_bytes().splitlines()
    names = list(json.loads(line)["metrics"])
    assert names == [n.replace("\ud800", "\\ud800") for n in HOSTILE]


def test_hostile_names_stay_in_one_csv_cell_and_are_never_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    deliver(CsvSink(path), [hostile()])
    names = [row[2] for row in rows(path)[1:]]
    assert len(names) == len(HOSTILE)
    assert not any(name.startswith(("=", "+", "-", "@")) for name in names)
    assert "'=HYPERLINK(1)/norm/total" in names
    assert "grad/norm/layer/line\nbreak" in names


@BOTH
def test_thousands_of_metrics_are_written(kind: Any, tmp_path: Path) -> None:
    sink = kind(tmp_path / "a")
    deliver(sink, [many(step, 5000) for step in (1, 2)])
    text = (tmp_path / "a").read_text()
    assert text.count("m/v/layer/") == 10_000


@BOTH
def test_patterns_choose_the_metrics(kind: Any, tmp_path: Path) -> None:
    deliver(kind(tmp_path / "a", metrics=["train/*"]), [record(1)])
    text = (tmp_path / "a").read_text()
    assert "train/loss/total" in text
    assert "grad/" not in text


@BOTH
def test_the_file_goes_to_the_run_directory_by_default(kind: Any, tmp_path: Path) -> None:
    sink = kind()
    sink.open(tmp_path, {"starts": [1.0]})
    deliver(sink, [record(1)])
    assert [p.stem for p in tmp_path.iterdir()] == ["metrics"]


@BOTH
def test_writing_without_a_path_and_a_run_directory_names_what_is_missing(kind: Any) -> None:
    with pytest.raises(InputError, match="there is no run directory; expected a path"):
        on_a_thread(lambda: kind().write(record(1)))


@BOTH
def test_a_resumed_run_continues_its_file_and_a_new_run_replaces_it(
    kind: Any, tmp_path: Path
) -> None:
    for starts, expected in ([1.0], 1), ([1.0, 2.0], 2), ([3.0], 1):
        sink = kind(metrics=["train/*"])
        sink.open(tmp_path, {"starts": starts})
        deliver(sink, [record(1)])
        (path,) = tmp_path.iterdir()
        assert path.read_text().count("train/loss/total") == expected


@BOTH
def test_a_file_that_the_user_names_is_never_replaced(kind: Any, tmp_path: Path) -> None:
    for _ in range(2):
        sink = kind(str(tmp_path / "mine"), metrics=["train/*"])
        sink.open(tmp_path / "run", {"starts": [1.0]})
        deliver(sink, [record(1)])
    assert (tmp_path / "mine").read_text().count("train/loss/total") == 2


def test_an_incomplete_line_of_a_killed_writer_damages_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1, "ti')
    deliver(JsonlSink(path), [record(2)])
    assert json.loads(path.read_text().splitlines()[1])["step"] == 2


@BOTH
def test_a_closed_sink_can_write_again(kind: Any, tmp_path: Path) -> None:
    sink = kind(tmp_path / "a", metrics=["train/*"])
    deliver(sink, [record(1)])
    deliver(sink, [record(2)])
    assert (tmp_path / "a").read_text().count("train/loss/total") == 2
    assert (tmp_path / "a").read_text().count("metric") <= 2  # one header, or one key per line


@BOTH
def test_an_unwritable_folder_is_an_error_until_it_is_writable(kind: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "folder"
    blocked.write_text("in the way")
    sink = kind(blocked / "a")
    with pytest.raises(OSError, match="folder"):
        on_a_thread(lambda: sink.write(record(1)))
    blocked.unlink()
    deliver(sink, [record(2)])
    assert "train/loss/total" in (blocked / "a").read_text()


def test_a_full_disk_neither_splits_nor_loses_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    sink = JsonlSink(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        sink.write(record(1))
        with pytest.raises(OSError, match="File too large"):
            sink.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    sink.write(record(2))
    sink.close()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_secrets_in_events_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish-0123")
    path = tmp_path / "a.jsonl"
    deliver(JsonlSink(path), [alert(1, message="refused: swordfish-0123"), stop(2, "failed")])
    assert "swordfish" not in path.read_text()
    assert "refused" in path.read_text()


@BOTH
def test_wrong_arguments_are_refused_immediately(kind: Any) -> None:
    with pytest.raises(InputError, match=r"sink \w+: path is 3; expected a path"):
        kind(3)
    with pytest.raises(InputError, match=r"sink \w+: metrics is 'train/\*'; expected a list"):
        kind(metrics="train/*")

"""`ulysses runs` and `ulysses report`: their output, also with untrusted text in runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

Ulysses = Callable[..., tuple[int, str, str]]


def record(
    path: Path, losses: list[float], status: str | None = "finished", alerts: int = 0
) -> None:
    directory = RunDirectory(path)
    directory.start({"engine": "ddp", "world_size": 2, "max_steps": 1000})
    sink = StoreSink(directory)
    for step, loss in enumerate(losses, 1):
        sink.write(StepRecord.of(step, time.time(), {"train/loss/total": loss}))
    for step in range(1, alerts + 1):
        sink.write(Event(kind="alert", step=step, time=time.time(), data={"rule": "spike"}))
    sink.close()
    directory.release() if status is None else directory.finish(status)


def test_runs_are_listed_in_the_order_of_their_starts(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "runs/later-in-the-alphabet", [2.0, 1.5], alerts=2)
    record(tmp_path / "runs/a-crash", [3.0], None)
    record(tmp_path / "runs/b-failure", [float("nan")], "failed")
    live = RunDirectory(tmp_path / "runs/c-live")
    live.start({})
    code, out, error = ulysses("runs")
    live.release()
    assert (code, error) == (0, "")
    head, *rows = [line.split() for line in out.splitlines()]
    assert head == ["run", "state", "step", "loss", "alerts", "started", "time"]
    assert [row[:2] for row in rows] == [
        ["later-in-the-alphabet", "finished"],
        ["a-crash", "crashed"],
        ["b-failure", "failed"],
        ["c-live", "running"],
    ]
    assert rows[0][2:7] == ["2", "of", "1,000", "1.500", "2"]
    assert rows[2][5] == "nan"


def test_json_has_every_run_and_problem(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "elsewhere/one", [2.0, float("inf")], "stopped", alerts=1)
    (tmp_path / "elsewhere/broken").mkdir()
    (tmp_path / "elsewhere/broken/run.json").write_text("{")
    code, out, error = ulysses("runs", "elsewhere", "--json")
    assert (code, error) == (0, "")
    answer = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    (run,) = answer["runs"]
    assert run["started"] <= run["ended"]
    assert run["seconds"] == pytest.approx(run["ended"] - run["started"])
    assert {key: run[key] for key in ("name", "status", "step", "max_steps", "loss", "alerts")} == {
        "name": "one",
        "status": "stopped",
        "step": 2,
        "max_steps": 1000,
        "loss": "inf",
        "alerts": 1,
    }
    assert list(answer["problems"]) == [str(tmp_path / "elsewhere/broken")]


def test_a_missing_folder_is_an_error_but_an_empty_one_is_not(
    ulysses: Ulysses, tmp_path: Path
) -> None:
    code, out, error = ulysses("runs")
    assert (code, out) == (2, "")
    assert error == (
        "ulysses: runs in runs: no such folder; expected a folder of runs, a glob or a list\n"
    )
    (tmp_path / "runs").mkdir()
    assert ulysses("runs") == (0, "no runs in runs\n", "")
    assert json.loads(ulysses("runs", "--json")[1]) == {"runs": [], "problems": {}}


def test_a_damaged_run_is_named_after_the_others(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "runs/good", [1.0])
    (tmp_path / "runs/bad").mkdir()
    (tmp_path / "runs/bad/run.json").write_text("{")
    code, out, error = ulysses("runs")
    assert code == 0
    assert "good" in out
    assert str(tmp_path / "runs/bad") in error
    assert len(error.splitlines()) == 1


def test_markup_and_escape_codes_in_names_are_shown_as_text(
    ulysses: Ulysses, tmp_path: Path
) -> None:
    for name in ("[red]x", "a\x1b[2Jb", "[link=x]"):
        record(tmp_path / "runs" / name, [1.0])
    (tmp_path / "runs/[bold]lost\x1b]0;title\x07/metrics").mkdir(parents=True)
    info = json.loads((tmp_path / "runs/[link=x]/run.json").read_text())
    info["status"] = "[blink]\x1b[31mdone"
    (tmp_path / "runs/[link=x]/run.json").write_text(json.dumps(info))
    _, out, error = ulysses("runs")
    assert "\x1b" not in out + error
    assert "\x07" not in error
    for text in ("[red]x", "a\ufffd[2Jb", "[link=x]", "[blink]\ufffd[31mdone"):
        assert text in out
    assert "[bold]lost" in error


def test_a_name_in_run_json_is_not_used_as_a_path(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "deep/runs/one", [1.0])
    file = tmp_path / "deep/runs/one/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": "../../x"}))
    assert ulysses("runs", "deep/runs")[1].splitlines()[1].split()[0] == "one"
    code, out, _ = ulysses("report", "deep/runs/one")
    assert (code, out) == (0, "deep/runs/one/report.html\n")
    assert not (tmp_path / "x").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_a_report_of_a_run_at_a_url_needs_an_output_file(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "one", [1.0, 0.5])
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "one"), "/for-the-report/one", recursive=True)
    code, _, error = ulysses("report", "memory://for-the-report/one")
    assert code == 2
    assert error.endswith("is written there; name a local file with --output FILE\n")
    code, out, _ = ulysses("report", "memory://for-the-report/one", "--output", "one.html")
    assert (code, out) == (0, "one.html\n")
    assert "one" in ulysses("runs", "memory://for-the-report")[1]
    memory.rm("/for-the-report", recursive=True)


def test_two_hundred_runs_are_listed_in_seconds(ulysses: Ulysses, tmp_path: Path) -> None:
    for i in range(200):
        record(tmp_path / f"runs/run-{i:03}", [1.0, 0.5, 0.25], alerts=1)
    begin = time.process_time()  # others may use the processor, too
    code, out, _ = ulysses("runs")
    assert time.process_time() - begin < 10
    assert code == 0
    assert len(out.splitlines()) == 201


def test_each_command_names_each_damaged_file_once(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "runs/one", [2.0, 1.5])
    (tmp_path / "runs/one/events.jsonl").write_text('{"kind": "sta\n')
    damage = {"events.jsonl": "lines that hold no event: 1"}
    for command in (
        ["report", "runs/one"],
        ["replay", "runs/one"],
        ["watch", "runs/one"],
        ["runs"],
    ):
        code, _, error = ulysses(*command)
        assert code == 0
        assert error.count("events.jsonl") == 1, command
        assert damage["events.jsonl"] in error
    assert json.loads(ulysses("replay", "runs/one", "--json")[1])["damaged"] == damage
    (row,) = json.loads(ulysses("runs", "--json")[1])["runs"]
    assert row["damaged"] == damage
    for file in (tmp_path / "runs/one/metrics").iterdir():
        file.unlink()
    (tmp_path / "runs/one/metrics").rmdir()
    assert "metrics: the folder is missing" in ulysses("runs")[2]


def test_a_failed_run_is_listed_with_the_reason(ulysses: Ulysses, tmp_path: Path) -> None:
    record(tmp_path / "runs/good", [2.0])
    directory = RunDirectory(tmp_path / "runs/bad")
    directory.start({})
    directory.finish("failed", {"error": "ValueError: \x1b[31mtoo long"})
    code, out, _ = ulysses("runs")
    assert code == 0
    assert out.splitlines()[-1] == "bad failed: ValueError: \N{REPLACEMENT CHARACTER}[31mtoo long"
    _, out, _ = ulysses("runs", "--json")
    reasons = {run["name"]: run["error"] for run in json.loads(out)["runs"]}
    assert reasons == {"good": None, "bad": "ValueError: \x1b[31mtoo long"}

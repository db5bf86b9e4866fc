from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ulysses_monitor as um
from ulysses_monitor.errors import InputError
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink


def write_run(path: Path, items: list[Any], status: str | None = "finished") -> um.RunReader:
    """A run with `items`; with no status it is left as a crash leaves it."""
    directory = RunDirectory(path)
    directory.start({"engine": "ddp", "world_size": 2})
    sink = StoreSink(directory)
    for item in items:
        sink.write(item)
    sink.close()
    directory.release() if status is None else directory.finish(status)
    return um.open_run(path)


def training(steps: int) -> list[StepRecord]:
    return [
        StepRecord.of(
            step,
            float(step),
            {
                "train/loss/total": 10.0 - step,
                "train/step_seconds/total": 2.0,
                "train/tokens_per_second/total": 100.0,
                "grad/norm/total": 1.0,
                "grad/norm/layer/0": 0.5,
                "grad/norm/layer/10": 0.25,
                "lora/grad_ratio_B_A/total": np.inf if step == 1 else 10.0 / step,
                "monitor/overhead_seconds/total": 0.02,
            },
        )
        for step in range(1, steps + 1)
    ]


def test_patterns_choose_columns_and_no_pattern_gives_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(3))
    assert list(run.metrics("grad/norm/layer/*")) == ["grad/norm/layer/0", "grad/norm/layer/10"]
    assert list(run.metrics("grad/norm/total", "train/loss/*")) == [
        "train/loss/total",
        "grad/norm/total",
    ]
    assert len(run.metrics().columns) == 8
    assert run.metrics("Grad/*").empty  # names are matched letter by letter
    assert run.metrics("no/such/*").shape == (0, 0)
    assert run.metrics().index.name == "step"


def test_events_are_chosen_by_kind_and_survive_a_torn_last_line(tmp_path: Path) -> None:
    events = [
        Event(kind="start", step=0, time=0.0, data={"engine": "ddp"}),
        Event(kind="alert", step=4, time=1.0, data={"rule": "spike", "value": float("nan")}),
    ]
    run = write_run(tmp_path / "run", events, None)
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"kind": "alert", "step": 5, "rul')
    assert run.events()["kind"].tolist() == ["start", "alert"]
    alerts = run.events("alert")
    assert alerts["step"].tolist() == [4]
    assert alerts["value"].tolist() == ["nan"]
    assert run.events("checkpoint").empty


def test_every_line_of_events_is_strict_json(tmp_path: Path) -> None:
    data = {"value": float("inf"), "many": [float("nan"), 1.0], "deep": {"x": -float("inf")}}
    write_run(tmp_path / "run", [Event(kind="alert", step=1, time=0.0, data=data)])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "run/events.jsonl").read_text(), parse_constant=refuse)
    assert (line["value"], line["many"], line["deep"]) == ("inf", ["nan", 1.0], {"x": "-inf"})


def test_a_message_with_unusual_line_separators_is_one_event(tmp_path: Path) -> None:
    message = "first\u2028second\x85third\nfourth\x0cfifth"
    run = write_run(tmp_path / "run", [Event(kind="a", step=1, time=0.0, data={"m": message})])
    assert run.events()["m"].tolist() == [message]


def test_the_status_is_crashed_where_nobody_writes_a_running_run(tmp_path: Path) -> None:
    assert write_run(tmp_path / "a", [], None).info["status"] == "crashed"
    assert write_run(tmp_path / "b", [], "stopped").info["status"] == "stopped"
    directory = RunDirectory(tmp_path / "c")
    directory.start({})
    assert um.open_run(tmp_path / "c").info["status"] == "running"
    directory.release()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json there"):
        um.open_run(tmp_path)


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    events = [Event(kind="alert", step=2, time=0.0), Event(kind="start", step=0, time=0.0)]
    held_out = [StepRecord.of(s, 100.0 + s, {"eval/loss/total": 5.0 - s}) for s in (2, 4)]
    summary = write_run(tmp_path / "run", [*training(8), *held_out, *events]).summary()
    assert summary["name"] == "run"
    assert (summary["engine"], summary["world_size"], summary["steps"]) == ("ddp", 2, 8)
    assert summary["loss_first"] == pytest.approx(7.0)  # mean of 9 ... 5
    assert summary["loss_last"] == pytest.approx(4.0)  # mean of 6 ... 2
    assert (summary["eval_loss_first"], summary["eval_loss_last"]) == (3.0, 1.0)
    assert summary["tokens_per_second"] == pytest.approx(100.0)
    assert summary["grad_norm_first"] == summary["grad_norm_last"] == 1.0
    assert summary["lora_ratio_first"] == np.inf
    assert summary["lora_ratio_last"] == pytest.approx(1.25)
    assert summary["alerts"] == 1
    assert summary["monitor_share"] == pytest.approx(0.01)


def test_the_summary_of_a_run_that_recorded_nothing(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "run", [], None).summary()
    assert (summary["status"], summary["steps"], summary["alerts"]) == ("crashed", 0, 0)
    assert summary["loss_first"] is None
    assert summary["monitor_share"] is None

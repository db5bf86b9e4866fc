from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

import ulysses_monitor as um
from ulysses_core.cli import watch as watching
from ulysses_core.cli.watch import Follower, watch
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Alert, Event, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

COMMAND = [sys.executable, "-m", "ulysses_core.cli", "watch"]
START = {"kind": "start", "step": 0, "time": 1.0, "engine": "plain", "world_size": 1.0}


class FakeRun:
    """What `watch` uses of a run reader, set by the test."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {"status": "running", "name": "demo"}
        self.rows: dict[int, dict[str, float]] = {}
        self.lines: list[dict[str, Any]] = [START]
        self.damaged: dict[str, str] = {}

    def train(self, *steps: int, **more: float) -> None:
        for step in steps:
            metrics = {"train/loss/total": 1.0, "train/step_seconds/total": 0.5}
            self.rows[step] = metrics | {k.replace("__", "/"): v for k, v in more.items()}

    def metrics(self, *patterns: str, missing: str) -> pd.DataFrame:
        assert patterns
        assert missing == "ignore"
        frame = pd.DataFrame.from_dict(self.rows, orient="index", dtype="float64")
        return frame.sort_index().rename_axis("step")

    def events(self) -> pd.DataFrame:
        return pd.DataFrame(self.lines)


def steps(items: list[StepRecord | Event]) -> list[int]:
    return [i.step for i in items if isinstance(i, StepRecord) and "train/loss/total" in i]


def follow(run: FakeRun) -> Follower:
    return Follower(run)  # type: ignore[arg-type]


def test_each_step_is_read_once() -> None:
    run = FakeRun()
    follower = follow(run)
    assert steps(list(follower.read_new())) == []
    run.train(1, 2)
    assert steps(list(follower.read_new())) == [1, 2]
    run.train(3)
    assert steps(list(follower.read_new())) == [3]
    assert list(follower.read_new()) == []


def test_events_and_evaluations_are_in_the_order_of_steps() -> None:
    run = FakeRun()
    run.train(1, 3)
    run.train(2, eval__loss__total=2.5)
    alert = Alert(rule="r", step=2, metric="a/a/a", value=1.0, threshold=0.0, message="Bad.")
    run.lines.append({"kind": "alert", "step": 2, "time": 2.0, **alert.to_event(0.0).data})
    items = list(follow(run).read_new())
    assert [item.step for item in items] == [0, 1, 2, 2, 2, 3]
    (found,) = [i for i in items if isinstance(i, Event) and i.kind == "alert"]
    assert found.data["message"] == "Bad."
    (held_out,) = [i for i in items if isinstance(i, StepRecord) and "eval/loss/total" in i]
    assert held_out["eval/loss/total"] == 2.5


def test_a_resumed_run_continues_at_the_step_of_its_start() -> None:
    run = FakeRun()
    run.train(*range(1, 11))
    follower = follow(run)
    list(follower.read_new())
    run.lines.append({**START, "step": 6})
    run.rows = {step: run.rows[step] for step in range(1, 7)}
    run.train(7, 8)
    items = list(follower.read_new())
    assert [i.kind for i in items if isinstance(i, Event)] == ["start"]
    assert steps(items) == [7, 8]


def test_a_nan_loss_is_kept_and_metrics_that_were_not_sampled_are_left_out() -> None:
    run = FakeRun()
    run.train(1, param__norm__total=2.0)
    run.train(2)
    run.rows[2]["train/loss/total"] = math.nan
    (_, first, second) = list(follow(run).read_new())
    assert isinstance(first, StepRecord)
    assert isinstance(second, StepRecord)
    assert first["param/norm/total"] == 2.0
    assert math.isnan(second["train/loss/total"])
    assert "param/norm/total" not in second


def test_only_the_last_steps_of_a_long_run_are_shown() -> None:
    run = FakeRun()
    run.train(*range(1, 2001))
    served = steps(list(follow(run).read_new()))
    assert len(served) == 500
    assert served[-1] == 2000


def test_watch_follows_a_run_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    run.lines = [{**START, "max_steps": 3.0}]
    monkeypatch.setattr(watching, "_PAUSE", 0.01)
    monkeypatch.setattr("ulysses_monitor.reading.open_run", lambda _: run)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, force_interactive=True, width=80, height=30)
    thread = threading.Thread(target=watch, args=("x", console))
    thread.start()
    for step in (1, 2, 3):
        run.train(step)
        time.sleep(0.1)
    run.info = {**run.info, "status": "crashed"}
    thread.join(10)
    assert not thread.is_alive()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue().rpartition("\x1b[2K")[2])
    assert shown.startswith("demo: plain, 1 process\n")
    assert re.search(r"step 3/3 +100%  crashed", shown)


def test_control_c_ends_it_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    monkeypatch.setattr("ulysses_monitor.reading.open_run", lambda _: run)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupt)
    watch("x", Console(file=io.StringIO()))


def test_a_path_without_a_run_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing"):
        watch(tmp_path / "nothing")


def test_a_finished_run_is_printed_as_lines_without_a_terminal(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = um.Monitor(tmp_path / "runs/demo", tensorboard=False)
    with monitor.watch(model, optimizer):
        for _ in range(3):
            loss = model(torch.ones(1, 2)).square().sum()
            loss.backward()
            monitor.observe(loss=loss, tokens=2)
            optimizer.step()
            optimizer.zero_grad()
        monitor.log({"eval/loss/total": 1.25})
    done = subprocess.run(
        [*COMMAND, "runs/demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "training: plain, 1 process"
    assert lines[1].startswith("step 1  loss ")
    assert "step 3: held-out loss 1.2500" in lines


def test_a_run_that_failed_is_shown_with_the_reason_and_its_last_lines(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory)
    log = [f"line {number}" for number in range(30)]
    data = {"status": "failed", "error": "ValueError: no", "log": log}
    sink.write(Event(kind="stop", step=3, time=2.0, data=data))
    sink.close()
    directory.finish("failed", {"error": "ValueError: no"})
    shown = io.StringIO()
    watch(tmp_path / "run", Console(file=shown, width=100))
    lines = shown.getvalue().splitlines()
    assert lines[-21:-19] == ["failed: ValueError: no", "  line 10"]
    assert lines[-1] == "  line 29"

"""``Accelerator(log_with="ulysses")`` after `um.register`."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from ulysses_monitor.integrations.reporting.names import name_tracker
from ulysses_monitor.session import open_sessions

QUIET = {"tensorboard": False}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("ULYSSES_RUN_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    # What a test of a failing session left open in this process would get the numbers.
    monkeypatch.setattr(open_sessions, "_opened", [])
    um.register(**QUIET)
    yield
    um.unregister()


def start(name: str = "demo", config: Any = None, **init: Any) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="ulysses")
    accelerator.init_trackers(name, config=config, init_kwargs={"ulysses": init})
    return accelerator


def table(run: str) -> dict[str, list[Any]]:
    frame = um.open_run(run).metrics("*")
    return {name: column.dropna().to_dict() for name, column in frame.items()}


def test_what_a_loop_logs_is_recorded_at_its_step_and_the_config_is_in_run_json() -> None:
    accelerator = start(config={"lr": 0.1, "api_token": "s3cr3t"})
    accelerator.log({"loss": 2.0, "eval_loss": torch.tensor(3.0), "note": "text"}, step=10)
    accelerator.log({"my/metric/total": math.nan, "epoch": 1})  # the step after
    accelerator.end_training()
    found = table("runs/demo")
    assert found["train/loss/total"] == {10: 2.0}
    assert found["eval/loss/total"] == {10: 3.0}
    assert found["train/epoch/total"] == {11: 1.0}
    assert um.open_run("runs/demo").metrics("my/metric/total").index.tolist() == [11]
    info = json.loads(Path("runs/demo/run.json").read_text())
    assert info["config"] == {"lr": 0.1, "api_token": "***"}
    assert (info["status"], info["last_step"]) == ("finished", 11)


def test_each_start_gets_a_run_and_init_kwargs_are_settings() -> None:
    for _ in range(2):
        accelerator = start()
        accelerator.log({"loss": 1.0})
        accelerator.end_training()
    accelerator = start(run_dir="elsewhere", sinks=["jsonl"])
    accelerator.log({"loss": 1.0})
    assert accelerator.get_tracker("ulysses").run_dir == Path("elsewhere")
    accelerator.end_training()
    assert sorted(p.name for p in Path("runs").iterdir()) == ["demo", "demo-2"]
    assert Path("elsewhere/metrics.jsonl").exists()
    with pytest.raises(um.InputError, match="tracker ulysses: sample_every is 0"):
        start(sample_every=0)


def test_inside_watch_the_numbers_belong_to_its_run() -> None:
    accelerator = start(config={"lr": 0.1})
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    with um.Monitor("watched", **QUIET).watch(model, optimizer):
        for step in range(1, 4):
            accelerator.backward(model(torch.ones(4, 2)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({"accuracy": step / 4, "loss": 9.0}, step=100 * step)
    accelerator.end_training()
    run = um.open_run("watched")
    assert run.metrics("train/accuracy/total")["train/accuracy/total"].to_dict() == {
        1: 0.25,
        2: 0.5,
        3: 0.75,
    }
    assert (run.metrics("grad/norm/total") > 0).all(axis=None)
    assert run.metrics("train/*loss/total").columns.tolist() == ["train/logged_loss/total"]
    assert run.info["tracker_config"] == {"lr": 0.1}
    assert not Path("runs").exists()


def test_a_failure_costs_numbers_and_never_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    Path("runs").write_text("in the way")
    accelerator = start()
    for _ in range(5):
        accelerator.log({"loss": 1.0})
    accelerator.end_training()
    messages = [m for m in caplog.messages if "tracker" in m]
    assert messages[0] == "monitor: tracker failed; training continues"
    assert messages[1].startswith("monitor: tracker is switched off: ")
    assert len(messages) == 2


def test_without_register_the_name_is_unknown() -> None:
    um.unregister()
    with pytest.raises(ValueError, match="Unsupported logging capability: ulysses"):
        start()


def test_an_accelerate_without_registration_lets_the_name_pass() -> None:
    def filter_trackers(log_with: Any, logging_dir: str | None = None) -> list[str]:
        if log_with is None:
            return []
        if unknown := [name for name in log_with if name != "wandb"]:
            raise ValueError(unknown)
        return log_with

    module = types.ModuleType("accelerate.tracking")
    vars(module).update(LOGGER_TYPE_TO_CLASS={}, filter_trackers=filter_trackers)
    undo = name_tracker(module, int)
    assert module.filter_trackers("ulysses", "dir") == ["ulysses"]
    assert module.filter_trackers(["wandb", "ulysses"]) == ["wandb", "ulysses"]
    assert module.filter_trackers(["wandb"]) == ["wandb"]
    assert module.filter_trackers(None) == []  # as a Trainer asks for none
    undo()
    assert module.filter_trackers is filter_trackers
    assert module.LOGGER_TYPE_TO_CLASS == {}


def test_a_run_of_logged_numbers_has_a_report() -> None:
    from ulysses_monitor.report import write_report

    accelerator = start()
    for step in range(1, 6):
        accelerator.log({"loss": 1.0 / step}, step=step)
    accelerator.end_training()
    page = write_report(um.open_run("runs/demo")).read_text()
    assert "0.2" in page  # the last loss
    assert "finished" in page

"""A run that fails keeps why, at which step, and how much memory it took."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ulysses_monitor as um


def test_the_exception_of_a_plain_loop_is_kept_without_its_secrets(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loop() -> None:
        with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            raise ValueError("no access\nwith password=hunter2hunter2")

    with pytest.raises(ValueError, match="no access"):
        loop()
    run = um.open_run(tmp_path / "run")
    (stop,) = run.event_list("stop")
    for about in (stop, run.info):
        assert about["status"] == "failed"
        assert about["error"] == "ValueError: no access with password=***"
        assert about["peak_memory"]["host"] > 10_000_000
    assert (stop["step"], run.info["last_step"]) == (1, 1)


def test_a_run_that_finished_has_no_error(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer):
        pass
    info = um.open_run(tmp_path / "run").info
    assert "error" not in info
    assert info["last_step"] == 0


SCRIPT = """
import sys, torch
import ulysses_monitor as um
from ulysses_monitor.engines import find_engine
from ulysses_monitor.session.opening import Training
model = torch.nn.Linear(3, 1)
engine = find_engine(model, torch.optim.SGD(model.parameters(), 0.1))
um.Monitor(sys.argv[1], tensorboard=False).open(engine, Training(step=0))
raise RuntimeError("out of order")
"""


def test_a_process_that_ends_with_an_exception_tells_which(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")], capture_output=True, timeout=120
    )
    assert done.returncode == 1
    info = um.open_run(tmp_path / "run").info
    assert (info["status"], info["error"]) == ("failed", "RuntimeError: out of order")


def test_an_older_exception_is_not_taken_for_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulysses_monitor.engines import find_engine
    from ulysses_monitor.session.opening import Training

    monkeypatch.setattr(sys, "last_value", KeyError("of another cell"), raising=False)
    model = nn.Linear(3, 1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    engine = find_engine(model, torch.optim.SGD(model.parameters(), 0.1))
    monitor.open(engine, Training())
    monitor.close("failed")
    assert "error" not in um.open_run(tmp_path / "run").info
    monitor.open(engine, Training())
    sys.last_value = ValueError("of this one")
    monitor.close("failed")
    assert um.open_run(tmp_path / "run-2").info["error"] == "ValueError: of this one"

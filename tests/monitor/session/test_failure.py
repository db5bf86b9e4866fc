"""A run that fails keeps why, at which step, and how much memory it took."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def fail(monitor: um.Monitor, loop: Callable[[], None]) -> dict[str, Any]:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train() -> None:
        with monitor.watch(model, optimizer):
            loop()

    with pytest.raises(RuntimeError):
        train()
    (stop,) = um.open_run(monitor.run_dir).event_list("stop")
    return dict(stop)


def test_a_run_that_fails_keeps_the_last_lines_of_the_log_without_their_secrets(
    tmp_path: Path,
) -> None:
    log, misfit = logging.getLogger("mine"), logging.getLogger("misfit")
    misfit.propagate = False
    misfit.addHandler(logging.NullHandler())
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)

    def loop() -> None:
        for number in range(100):
            log.warning("line %d", number)
        log.debug("not shown")
        log.warning("token=%s %s", "abcdef123456", "x" * 1000)
        misfit.warning("two %s", "arguments", "too many")
        raise RuntimeError

    stop = fail(monitor, loop)
    assert len(stop["log"]) == 50
    assert stop["log"][-2] == "WARNING mine: line 99"
    assert stop["log"][-1].startswith("WARNING mine: token=*** xxx")
    assert len(stop["log"][-1]) < 410
    assert "log" not in um.open_run(tmp_path / "run").info


def test_keeping_the_log_changes_nothing_about_logging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory, handlers = logging.getLogRecordFactory(), list(logging.getLogger().handlers)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer):
        assert logging.getLogger().handlers == handlers
        inner = logging.getLogRecordFactory()
    assert logging.getLogRecordFactory() is factory
    record = inner("mine", logging.WARNING, "file", 1, "after %d", (3,), None)
    assert record.getMessage() == "after 3"
    assert "log" not in um.open_run(tmp_path / "run").event_list("stop")[0]


def test_standard_error_is_kept_once_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("mine")
    log.addHandler(handler)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)

    def loop() -> None:
        assert monitor.session is not None
        monitor.session.failure.log.follow(stream)
        log.warning("of logging")
        sys.stderr.write("of a program\n")
        for percent in (10, 20):
            sys.stderr.write(f"\rdone: {percent} %")
        other = threading.Thread(target=lambda: sys.stderr.write("of another thread\n"))
        other.start()
        other.join()
        raise RuntimeError

    try:
        stop = fail(monitor, loop)
    finally:
        log.removeHandler(handler)
    assert stop["log"] == ["WARNING mine: of logging", "of a program", "done: 20 %"]
    assert "write" not in vars(stream)


def test_the_exception_that_is_being_handled_is_the_reason(tmp_path: Path) -> None:
    from ulysses_monitor.engines import find_engine
    from ulysses_monitor.session.opening import Training

    model = nn.Linear(3, 1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    engine = find_engine(model, torch.optim.SGD(model.parameters(), 0.1))
    monitor.open(engine, Training())
    try:
        raise RuntimeError("out of memory")
    except RuntimeError:
        monitor.open(engine, Training())  # the training that is tried again
        monitor.close("failed")
    assert um.open_run(tmp_path / "run").info["error"] == "RuntimeError: out of memory"
    assert "error" not in um.open_run(tmp_path / "run-2").info


def test_a_run_that_cannot_be_opened_leaves_logging_alone(tmp_path: Path) -> None:
    factory = logging.getLogRecordFactory()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = um.Monitor(tmp_path / "run", policies=["lr_boost", "warmup_cosine"])
    with pytest.raises(um.InputError), monitor.watch(model, optimizer):
        pass
    assert logging.getLogRecordFactory() is factory

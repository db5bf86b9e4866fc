"""Where a monitor records: a directory of its own choice, and one that is taken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from ulysses_monitor.engines import find_engine
from ulysses_monitor.session.naming import program_name
from ulysses_monitor.session.opening import Training
from ulysses_monitor.store import RunDirectory


def train(monitor: um.Monitor, steps: int = 1, **watch: Any) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with monitor.watch(model, optimizer, **watch):
        for _ in range(steps):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()


def leave_open(monitor: um.Monitor) -> None:
    """Begins a training that never ends, as in a notebook cell that is interrupted."""
    model = nn.Linear(3, 1)
    monitor.open(find_engine(model, torch.optim.SGD(model.parameters(), 0.1)), Training())


def status(path: Path) -> str:
    return str(um.open_run(path).info["status"])


SCRIPT = """
import torch
import ulysses_monitor as um
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with um.Monitor(tensorboard=False).watch(model, optimizer):
    pass
"""


@pytest.mark.parametrize("start", ["script", "module", "command"])
def test_without_a_directory_the_run_is_named_after_the_program(tmp_path: Path, start: str) -> None:
    (tmp_path / "fine_tune.py").write_text(SCRIPT)
    arguments = {
        "script": ["fine_tune.py"],
        "module": ["-m", "fine_tune"],
        "command": ["-c", SCRIPT],
    }
    done = subprocess.run(
        [sys.executable, *arguments[start]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    name = "python" if start == "command" else "fine_tune"
    assert re.fullmatch(name + r"-\d{8}-\d{6}", run.name)
    assert done.stderr == f"ulysses: recording to runs/{run.name}\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("variables", "environment", "name"),
    [
        ({"__vsc_ipynb_file__": "/home/me/my study.ipynb"}, {}, "my study"),
        ({}, {"JPY_SESSION_NAME": "work/try.ipynb"}, "try"),
        ({}, {}, "notebook"),
    ],
)
def test_in_a_notebook_its_file_gives_the_name(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    environment: dict[str, str],
    name: str,
) -> None:
    shell = SimpleNamespace(user_ns=variables)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert program_name() == name


def test_a_directory_that_an_earlier_process_left_sends_the_run_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "run"
    train(um.Monitor(first, tensorboard=False), 3)
    monitor = um.Monitor(first, tensorboard=False)
    assert capsys.readouterr().err == ""
    train(monitor)
    assert monitor.run_dir == tmp_path / "run-2"
    assert capsys.readouterr().err == f"ulysses: {first} is taken; recording to {first}-2\n"
    assert um.open_run(first).info["last_step"] == 3
    assert um.open_run(tmp_path / "run-2").info["numbered_after"] == "run"


def test_the_same_code_run_again_gets_numbers_also_while_the_first_run_is_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = compile("monitor = um.Monitor(run_dir, tensorboard=False); go(monitor)", "cell", "exec")
    places = []
    for go in (train, train, leave_open, leave_open):
        names: dict[str, Any] = {"um": um, "run_dir": tmp_path / "run", "go": go}
        exec(cell, names)  # noqa: S102 - the cell above
        places.append(names["monitor"])
    assert [monitor.run_dir.name for monitor in places] == ["run", "run-2", "run-3", "run-4"]
    assert status(tmp_path / "run-3") == "running"
    for monitor in places:
        monitor.close()


@pytest.mark.parametrize("if_exists", ["resume", "overwrite"])
def test_a_run_that_this_process_left_open_is_ended_to_be_continued_or_replaced(
    tmp_path: Path, if_exists: Any
) -> None:
    first = um.Monitor(tmp_path / "run", tensorboard=False)
    leave_open(first)
    again = um.Monitor(tmp_path / "run", tensorboard=False, if_exists=if_exists)
    train(again)
    assert again.run_dir == tmp_path / "run"
    assert not (tmp_path / "run-2").exists()
    assert len(um.open_run(tmp_path / "run").info["starts"]) == (2 if if_exists == "resume" else 1)
    assert first.session is None


def test_refusing_happens_at_once_and_not_when_the_training_begins(tmp_path: Path) -> None:
    train(um.Monitor(tmp_path / "run", tensorboard=False))
    with pytest.raises(um.InputError, match="already holds a run"):
        um.Monitor(tmp_path / "run", if_exists="refuse")
    used = RunDirectory(tmp_path / "used")
    for if_exists in ("refuse", "resume", "overwrite"):
        with pytest.raises(um.InputError, match="in use by a running training"):
            um.Monitor(tmp_path / "used", if_exists=if_exists)
    used.release()
    (tmp_path / "file").touch()
    with pytest.raises(um.InputError, match="is a file; expected a directory"):
        um.Monitor(tmp_path / "file")


@pytest.mark.parametrize("if_exists", ["new", "resume", "overwrite"])
def test_a_directory_that_another_process_takes_meanwhile_costs_only_the_name(
    tmp_path: Path, if_exists: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, if_exists=if_exists)
    used = RunDirectory(tmp_path / "run")
    train(monitor)
    used.release()
    assert monitor.run_dir == tmp_path / "run-2"
    assert "is in use by a running training; recording to" in capsys.readouterr().err


def test_a_directory_that_is_taken_between_looking_and_opening_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulysses_monitor.session import recording

    def lose_the_race(path: Path, if_exists: Any) -> RunDirectory:
        if path.name == "run":
            RunDirectory(path).start({})
        return RunDirectory(path, if_exists)

    monkeypatch.setattr(recording, "RunDirectory", lose_the_race)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    train(monitor)
    assert monitor.run_dir == tmp_path / "run-2"


def test_a_training_that_resumes_in_a_new_process_continues_its_numbered_run(
    tmp_path: Path,
) -> None:
    train(um.Monitor(tmp_path / "run", tensorboard=False), 5)
    train(um.Monitor(tmp_path / "run", tensorboard=False), 2)
    train(um.Monitor(tmp_path / "run-3", tensorboard=False), 2)  # named by the user
    resumed = um.Monitor(tmp_path / "run", tensorboard=False)
    train(resumed, step=2)
    assert resumed.run_dir == tmp_path / "run-2"
    assert um.open_run(tmp_path / "run-2").info["last_step"] == 3


def test_a_numbered_run_has_a_numbered_copy(tmp_path: Path) -> None:
    for _ in range(2):
        train(um.Monitor(tmp_path / "run", tensorboard=False, mirror=str(tmp_path / "copy")))
    for name in ("copy", "copy-2"):
        assert um.open_run(tmp_path / name).info["last_step"] == 1


def test_resuming_continues_also_a_numbered_run_that_this_process_left_open(tmp_path: Path) -> None:
    train(um.Monitor(tmp_path / "run", tensorboard=False), 5)
    interrupted = um.Monitor(tmp_path / "run", tensorboard=False)
    leave_open(interrupted)
    again = um.Monitor(tmp_path / "run", tensorboard=False)
    train(again, step=2)
    assert interrupted.run_dir == again.run_dir == tmp_path / "run-2"
    assert interrupted.session is None

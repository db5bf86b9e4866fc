"""One monitor and several trainings."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from ulysses_monitor.session.settings import MonitorSettings


def train(monitor: um.Monitor, steps: int, **watch: Any) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with monitor.watch(model, optimizer, **watch):
        for _ in range(steps):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()


def recorded(path: Path) -> list[int]:
    return [int(step) for step in um.open_run(path).metrics("grad/norm/total").index]


def test_each_later_training_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    assert monitor.run_dir == tmp_path / "run"
    places = []
    for steps in (1, 2, 3):
        train(monitor, steps)
        places.append(monitor.run_dir.name)
    assert places == ["run", "run-2", "run-3"]
    assert [len(recorded(tmp_path / place)) for place in places] == [1, 2, 3]
    assert monitor.session is None


@pytest.mark.parametrize("if_exists", ["refuse", "overwrite"])
def test_a_later_training_touches_nobody_elses_run(tmp_path: Path, if_exists: Any) -> None:
    train(um.Monitor(tmp_path / "run-2", tensorboard=False), 5)
    (tmp_path / "run-3").write_text("a file")
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, if_exists=if_exists)
    train(monitor, 1)
    train(monitor, 1)
    assert monitor.run_dir.name == "run-4"
    assert len(recorded(tmp_path / "run-2")) == 5


@pytest.mark.parametrize(("if_exists", "watch"), [("refuse", {"step": 2}), ("resume", {"step": 0})])
def test_a_resumed_training_continues_the_run_of_the_one_before(
    tmp_path: Path, if_exists: Any, watch: dict[str, int]
) -> None:
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, if_exists=if_exists)
    train(monitor, 2)
    train(monitor, 1, **watch)
    assert monitor.run_dir.name == "run"
    assert recorded(tmp_path / "run") == ([1, 2, 3] if watch["step"] else [1, 2])
    assert not (tmp_path / "run-2").exists()


def test_sinks_rules_and_policies_serve_each_training_from_the_start(tmp_path: Path) -> None:
    seen: list[int] = []

    def looks_back(history: Any) -> list[um.Action]:
        seen.append(len(history))
        return []

    sink = um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink], policies=[looks_back])
    train(monitor, 2)
    train(monitor, 2)
    assert seen == [1, 2, 1, 2]
    assert [record.step for record in sink.records if "grad/norm/total" in record] == [1, 2, 1, 2]


def test_the_signature_names_every_setting(tmp_path: Path) -> None:
    parameters = inspect.signature(um.Monitor).parameters
    assert set(MonitorSettings.model_fields) < set(parameters)
    assert parameters["sample_every"].default == 10


def test_a_run_without_policies_has_nothing_to_keep_with_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    assert monitor.state_dict() == {}
    with monitor.watch(model, optimizer):
        assert monitor.state_dict() == {}
    with_policy = um.Monitor(tmp_path / "other", tensorboard=False, policies=["agc"])
    with with_policy.watch(model, optimizer):
        assert set(with_policy.state_dict()) == {"policies"}


def test_between_trainings_observing_and_logging_do_nothing(tmp_path: Path) -> None:
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    monitor.observe(loss=1.0, tokens=3)
    monitor.before_clip()
    monitor.log({"my/metric/total": 1.0})
    monitor.close()
    assert not (tmp_path / "run").exists()

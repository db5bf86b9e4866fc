"""A step is computed again where an alert asks for it, and nothing of the training changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from tests.support.hf_cases import run_checks
from tests.support.rerun_cases import check_fault, check_rerun
from tests.support.spawn import spawn

ASKS = [{"train/loss/total > 0": {"name": "any", "on_alert": "rerun"}}]


def run_all(root: str, engines: list[str]) -> dict[str, str]:
    words = run_checks({"rerun": check_rerun}, root, engines)
    return words | run_checks({"fault": check_fault}, root, engines[:1])


@pytest.mark.parametrize(
    ("processes", "engines"), [(1, ["loop-plain", "plain"]), (2, ["loop-ddp", "ddp", "zero2"])]
)
def test_a_step_is_computed_again_and_the_training_is_bit_by_bit_the_same(
    tmp_path: Path, processes: int, engines: list[str]
) -> None:
    for words in spawn(run_all, processes, args=(str(tmp_path), engines), timeout=240):
        assert {name: text for name, text in words.items() if text} == {}
        assert len(words) == len(engines) + 1


def step(model: Any, optimizer: Any, monitor: um.Monitor, **kwargs: Any) -> None:
    out = model(torch.ones(2, 4), **kwargs)
    loss = out.square().mean()
    monitor.observe(loss=loss)
    loss.backward()
    optimizer.step()


def watched(folder: Path, model: Any, rules: Any = ASKS) -> tuple[um.Monitor, Any]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    return um.Monitor(folder / "run", tensorboard=False, rules=rules), optimizer


def test_a_loss_scale_that_is_divided_out_before_clipping_is_counted_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    monitor, optimizer = watched(tmp_path, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with monitor.watch(model, optimizer, scaler=scaler):
        loss = model(torch.ones(2, 4)).square().mean()
        monitor.observe(loss=loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    (event,) = um.open_run(tmp_path / "run").event_list("rerun")
    assert event["repeats"]
    assert event["grad_norm_again"] == pytest.approx(event["grad_norm"], rel=1e-6)
    assert scaler.get_scale() == 1024.0


def test_a_gradient_that_is_not_finite_repeats_where_the_data_are_to_blame(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    monitor, optimizer = watched(tmp_path, model, [{"nonfinite": {"on_alert": "rerun"}}])
    with monitor.watch(model, optimizer):
        for value in (1.0, float("inf")):
            loss = model(torch.full((2, 4), value)).square().mean()
            monitor.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (event,) = um.open_run(tmp_path / "run").event_list("rerun")
    assert (event["step"], event["repeats"]) == (2, True)
    assert event["grad_norm"] == event["grad_norm_again"] == "nan"


def test_an_input_changed_in_place_is_said_and_training_continues(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    monitor, optimizer = watched(tmp_path, model)
    with monitor.watch(model, optimizer):
        x = torch.ones(2, 4)
        loss = model(x).square().mean()
        monitor.observe(loss=loss)
        loss.backward()
        x.zero_()
        optimizer.step()
    (event,) = um.open_run(tmp_path / "run").event_list("rerun")
    assert "changed in place" in event["error"]
    assert "repeats" not in event
    assert len(um.open_run(tmp_path / "run").metrics("grad/norm/total")) == 1


def test_a_model_that_fails_the_second_time_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    class Once(nn.Linear):
        made = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.made += 1
            torch.rand(3)
            if self.made == 2:
                raise RuntimeError("only once")
            return super().forward(x)

    torch.manual_seed(0)
    model = Once(4, 1)
    monitor, optimizer = watched(tmp_path, model)
    with monitor.watch(model, optimizer):
        step(model, optimizer, monitor)
        after = torch.rand(1)
    (event,) = um.open_run(tmp_path / "run").event_list("rerun")
    assert event["error"].endswith("RuntimeError: only once")
    torch.manual_seed(0)
    Once(4, 1)(torch.ones(2, 4))
    assert torch.equal(after, torch.rand(1))


def test_rerun_goes_with_other_words_and_its_rows_are_not_seen_twice(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    rule = {"train/loss/total > 0": {"name": "any", "on_alert": ["rerun", "save"]}}
    monitor, optimizer = watched(tmp_path, model, [rule])
    saved: list[int] = []
    with monitor.watch(model, optimizer, save=saved.append):
        for _ in range(3):
            step(model, optimizer, monitor)
    run = um.open_run(tmp_path / "run")
    assert len(run.event_list("rerun")) == 1
    assert saved == [2]
    (control,) = run.event_list("control")
    assert control["result"] == "save"
    assert {
        len(um_rows.splitlines()) for um_rows in [(run.path / "rows/rank-0.jsonl").read_text()]
    } == {3}
    assert len(run.event_list("rows")[0]["rows"]) == 2


def compiled(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: torch.compile(nn.Linear(4, 1), backend="eager"), "torch.compile"),
        (lambda: compiled(nn.Linear(4, 1)), "torch.compile"),
        (lambda: nn.Sequential(nn.Linear(4, 1), nn.SyncBatchNorm(1)), "SyncBatchNorm"),
    ],
)
def test_what_cannot_be_computed_again_is_refused_by_name_at_start(
    tmp_path: Path, build: Any, said: str
) -> None:
    model = build()
    monitor, optimizer = watched(tmp_path, model)
    with (
        pytest.raises(um.InputError, match=f"rule any: on_alert is rerun; .*uses {said}"),
        monitor.watch(model, optimizer),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_rule_about_what_is_known_too_late_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    rule = {"train/step_seconds/total > 0": {"name": "slow", "on_alert": "rerun"}}
    monitor, optimizer = watched(tmp_path, model, [rule])
    with (
        pytest.raises(um.InputError, match=r"rule slow: .*known only after the step"),
        monitor.watch(model, optimizer),
    ):
        pass


def refused(engine: str, folder: Path) -> None:
    from tests.support.hf_cases import build_trainer

    monitor = um.Monitor(folder / "run", tensorboard=False, rules=ASKS)
    trainer = build_trainer(engine, folder)
    monitor.attach(trainer)
    with pytest.raises(um.InputError, match="uses deepspeed-zero3"):
        trainer.train()


def run_refused(root: str) -> dict[str, str]:
    return run_checks({"refused": refused}, root, ["zero3"])


def test_zero3_is_refused_by_name(tmp_path: Path) -> None:
    for words in spawn(run_refused, 2, args=(str(tmp_path),)):
        assert words == {"zero3-refused": ""}

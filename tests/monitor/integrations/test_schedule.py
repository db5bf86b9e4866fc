"""`optim/lr_off_schedule/0` and `train/loss_before_resume/total`: what a Trainer promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer

OFF, BEFORE = "optim/lr_off_schedule/0", "train/loss_before_resume/total"


def trained(
    folder: Path, change: Callable[[Any], object] = lambda _: None, **arguments: Any
) -> um.RunReader:
    settings: dict[str, Any] = {"max_steps": 20, "warmup_steps": 4, "max_grad_norm": 1.0}
    trainer = build_trainer("plain", folder, **settings | arguments)
    change(trainer)
    um.Monitor(folder / "run", tensorboard=False).attach(trainer)
    trainer.train()
    return um.open_run(folder / "run")


def fired(run: um.RunReader) -> list[str]:
    alerts = run.events("alert")
    return [] if alerts.empty else alerts["rule"].tolist()


def steps_scheduler(trainer: Any, times: Callable[[int], int]) -> None:
    """Steps the scheduler `times` for each step, as a loop does that is wrong."""
    make = trainer.create_scheduler

    def create(*args: Any, **kwargs: Any) -> Any:
        scheduler = make(*args, **kwargs)
        step = scheduler.step

        def step_often(*given: Any) -> None:
            for _ in range(times(scheduler.last_epoch)):
                step(*given)

        scheduler.step = step_often
        return scheduler

    trainer.create_scheduler = create


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-6, "warmup_steps": 0.5},
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 5e-3},
        },
    ],
)
def test_a_trainers_own_schedule_is_on_itself(tmp_path: Path, arguments: dict[str, Any]) -> None:
    run = trained(tmp_path, **arguments)
    assert run.metrics(OFF)[OFF].abs().max() < 1e-12
    assert "rate_off_schedule" not in fired(run)


@pytest.mark.parametrize(("times", "step"), [(2, 3), (0, 3)])
def test_a_scheduler_stepped_twice_or_never_is_found(tmp_path: Path, times: int, step: int) -> None:
    run = trained(tmp_path, lambda trainer: steps_scheduler(trainer, lambda _: times))
    alerts = run.events("alert")
    (found,) = alerts[alerts["rule"] == "rate_off_schedule"].to_dict("records")
    assert found["step"] == step


def test_a_schedule_that_was_made_for_other_steps_is_found(tmp_path: Path) -> None:
    def make_for_more(trainer: Any) -> None:
        make = trainer.create_scheduler
        trainer.create_scheduler = lambda num_training_steps, optimizer=None: make(
            4 * num_training_steps, optimizer
        )

    assert "rate_off_schedule" in fired(trained(tmp_path, make_for_more))


def test_a_users_own_schedule_is_not_judged(tmp_path: Path) -> None:
    def give(trainer: Any) -> None:
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)

    run = trained(tmp_path, give)
    assert OFF not in run.names()
    assert "rate_off_schedule" in run.info["rules_not_checked"]


def test_a_policys_factor_on_the_rate_does_not_count(tmp_path: Path) -> None:
    def halves(_: Sequence[um.StepRecord]) -> list[um.Action]:
        return [um.Action(kind="lr_factor", values={"factor": 0.5})]

    trainer = build_trainer("plain", tmp_path, max_steps=8, warmup_steps=2)
    um.Monitor(tmp_path / "acts", tensorboard=False, policies=[halves]).attach(trainer)
    um.Monitor(tmp_path / "looks", tensorboard=False).attach(trainer)
    trainer.train()
    acts, looks = (um.open_run(tmp_path / name) for name in ("acts", "looks"))
    assert acts.metrics("optim/lr/0")["optim/lr/0"].max() == pytest.approx(5e-3)
    for run in (acts, looks):
        assert run.metrics(OFF)[OFF].abs().max() < 1e-12


@pytest.mark.parametrize("loses", [False, True])
def test_a_resume_with_other_weights_is_found_by_its_loss(tmp_path: Path, loses: bool) -> None:
    def build(**more: Any) -> Any:
        trainer = build_trainer("plain", tmp_path, logging_steps=2, max_grad_norm=1.0, **more)
        trainer.train_dataset = trainer.train_dataset[:4]  # which a few steps learn
        return trainer

    first = build(max_steps=24, save_strategy="steps", save_steps=24, learning_rate=3e-2)
    first.train()
    again = build(max_steps=32, learning_rate=3e-2)
    load = again._load_from_checkpoint

    def load_nothing(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        for parameter in again.model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)

    if loses:
        again._load_from_checkpoint = load_nothing
    um.Monitor(tmp_path / "run", tensorboard=False).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-24"))
    run = um.open_run(tmp_path / "run")
    logged = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert run.metrics(BEFORE)[BEFORE].tolist() == [max(logged[-8:])]
    assert run.metrics(BEFORE).index.tolist() == [25]
    assert ("loss_after_resume" in fired(run)) is loses
    assert "rate_off_schedule" not in fired(run)  # its first step has the rate of the checkpoint

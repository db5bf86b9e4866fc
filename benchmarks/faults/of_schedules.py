"""Faults of the schedule; the loop records, as a Trainer's does, how far the rate is off it."""

from __future__ import annotations

from benchmarks.faults.registry import fault
from benchmarks.faults.training import Training


@fault("rate_off_schedule")
def scheduler_stepped_twice(training: Training) -> None:
    away = {"optim/lr_off_schedule/0": 0.0}

    def step_again(step: int, t: Training) -> None:
        rate = t.optimizer.param_groups[0]["lr"]
        away["optim/lr_off_schedule/0"] = rate / t.setting.rate - t.planned(step - 1)
        t.scheduler.step()  # as if each of two ranks did, or each of two micro-batches

    training.on_step = step_again
    training.logs = lambda _, __: away

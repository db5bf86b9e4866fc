"""`eval/random_steps/total`: an evaluation draws no random numbers, unless dropout stays on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer
from ulysses_monitor.integrations.evaluation import RandomDraws, draws_on_purpose

NAME = "eval/random_steps/total"


def evaluated(folder: Path, drop: bool) -> um.RunReader:
    trainer = build_trainer(
        "plain",
        folder,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
    )
    if drop:
        head = trainer.model.lm_head
        head.register_forward_pre_hook(lambda _, x: (torch.nn.functional.dropout(x[0], 0.1),))
    monitor = um.Monitor(folder / "run", tensorboard=False)
    monitor.attach(trainer)
    trainer.train()
    return um.open_run(folder / "run")


@pytest.mark.parametrize(("drop", "share"), [(False, 0.0), (True, 1.0)])
def test_dropout_that_stays_on_in_an_evaluation_is_found(
    tmp_path: Path, drop: bool, share: float
) -> None:
    run = evaluated(tmp_path, drop)
    assert run.metrics(NAME)[NAME].tolist() == [share, share]
    alerts = run.events("alert")
    found = [] if alerts.empty else alerts["rule"].tolist()
    assert ("random_in_evaluation" in found) is drop


def test_one_step_says_nothing_and_an_evaluation_does_not_count_the_one_before() -> None:
    draws, cpu = RandomDraws(), torch.device("cpu")
    draws.see(cpu)
    assert draws.take() == {}
    torch.rand(1)
    draws.see(cpu)
    draws.see(cpu)
    torch.rand(1)
    draws.see(cpu)
    assert draws.take() == {NAME: 0.5}


@pytest.mark.parametrize("setting", ["predict_with_generate", "generate_during_eval"])
def test_sampling_in_an_evaluation_is_meant(setting: str) -> None:
    class Holder:
        data_collator = args = None

        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    assert draws_on_purpose(Holder(args=Holder(**{setting: True})))
    assert draws_on_purpose(Holder(args=Holder(), data_collator=Holder(mlm=True)))
    assert draws_on_purpose(Holder(args=Holder(), generation_config=None))
    assert not draws_on_purpose(Holder(args=Holder()))

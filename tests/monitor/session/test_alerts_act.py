"""What an alert asks for is done at the next step, by the same road as `ulysses control`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ulysses_monitor as um
from tests.support.spawn import spawn


def train(
    path: Path, rules: Any, *, steps: int = 12, numbers: bool = False, **settings: Any
) -> Any:
    """Trains a model whose loss is 100 at step 5 alone; returns the run and what was saved."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    saved: list[int] = []
    monitor = um.Monitor(path, rules=rules, tensorboard=False, **settings)
    with monitor.watch(model, optimizer, save=saved.append):
        for step in range(1, steps + 1):
            loss = model(torch.ones(2, 4)).square().mean()
            monitor.observe(loss=100.0 if step == 5 else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if numbers:
                monitor.log({"train/kl/total": 9.0 if step == 7 else 0.1})
    return um.open_run(path), saved, monitor


HIGH = "train/loss/total > 50"


def test_an_alert_saves_a_checkpoint_at_the_next_step(tmp_path: Path) -> None:
    run, saved, _ = train(tmp_path / "run", [{HIGH: {"name": "high", "on_alert": "save"}}])
    assert saved == [6]
    (alert,) = run.events("alert").to_dict("records")
    assert (alert["step"], alert["rule"], alert["command"]) == (5, "high", ["save"])
    (control,) = run.events("control").to_dict("records")
    assert (control["who"], control["result"]) == ("rule high", "save")
    assert control["why"] == alert["message"]


def test_an_alert_stops_the_training_and_the_run_says_why(tmp_path: Path) -> None:
    run, _, monitor = train(tmp_path / "run", [{HIGH: {"name": "high", "on_alert": "stop"}}])
    assert run.info["last_step"] == 6
    assert run.info["status"] == "stopped"
    assert "rule high: Step 5" in monitor.stopped


def test_an_alert_switches_a_policy_on(tmp_path: Path) -> None:
    rules = [{HIGH: {"name": "high", "on_alert": ["policy.clip_threshold=active", "save"]}}]
    policies = [{"clip_threshold": {"above": 1e-9}}]
    run, saved, _ = train(tmp_path / "run", rules, policies=policies, mode="shadow")
    (control,) = run.events("control").to_dict("records")
    assert control["result"] == "policy clip_threshold to active; save"
    assert saved == [6]
    modes = run.events("action").groupby("step")["mode"].first()
    assert set(modes[modes.index < 6]) == {"shadow"}
    assert set(modes[modes.index >= 6]) == {"active"}


def test_what_cannot_be_done_is_refused_in_an_event_and_training_continues(tmp_path: Path) -> None:
    rules = [{HIGH: {"name": "high", "on_alert": "policy.unknown=active"}}]
    run, _, _ = train(tmp_path / "run", rules)
    (control,) = run.events("control").to_dict("records")
    assert "unknown" in control["refused"]
    assert run.info["last_step"] == 12


def test_a_users_alert_may_ask_and_a_wrong_word_costs_one_line(tmp_path: Path) -> None:
    def mine(history: Any) -> list[um.Alert]:
        step = history[-1].step
        word = {3: ("save",), 8: ("explode",)}.get(step)
        return (
            []
            if word is None
            else [
                um.Alert(
                    rule="mine",
                    step=step,
                    metric="a/a/a",
                    value=1,
                    threshold=0,
                    message="m",
                    command=word,
                )
            ]
        )

    run, saved, _ = train(tmp_path / "run", [mine])
    assert saved == [4]
    (failed,) = [e for e in run.events("monitor").to_dict("records") if e.get("part")]
    assert failed["part"] == "what rule mine asks for"
    assert run.info["last_step"] == 12


def test_rules_see_what_is_logged_live_and_in_a_replay(tmp_path: Path) -> None:
    from ulysses_monitor.diagnosis.replay import replay_rules

    rules = ["train/kl/total > 1 and train/loss/total > 0"]
    run, _, _ = train(tmp_path / "run", rules, numbers=True)
    live = run.events("alert").to_dict("records")
    assert [(alert["rule"], alert["step"]) for alert in live] == [("train_kl", 7)]
    replayed = replay_rules(run, rules).events
    assert [(e.data["rule"], e.step) for e in replayed] == [("train_kl", 7)]


def test_run_json_says_which_rules_could_not_be_checked(tmp_path: Path) -> None:
    run, _, _ = train(tmp_path / "run", "default")
    reasons = run.info["rules_not_checked"]
    assert "LoRA" in reasons["lora_idle"]
    assert "nonfinite" not in reasons


@pytest.mark.parametrize("rules", ["off", []])
def test_without_rules_nothing_is_unchecked(tmp_path: Path, rules: Any) -> None:
    run, _, _ = train(tmp_path / "run", rules, steps=2)
    assert run.info["rules_not_checked"] == {}


def train_on_two_ranks(folder: str) -> dict[str, Any]:
    """Trains a DDP model; from step 5 on, both ranks have the same rows. The alert asks to stop."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rules = [{"same_data_on_ranks": {"on_alert": "stop"}}]
    monitor = um.Monitor(folder, rules=rules, tensorboard=False)
    steps = 0
    with monitor.watch(model, optimizer):
        for step in range(1, 13):
            own = 100 * rank if step < 5 else 0
            draw = torch.Generator().manual_seed(step + own)
            loss = model(torch.randn(6, 4, generator=draw)).square().mean()
            monitor.observe(loss=loss)
            loss.backward()
            steps += 1
            optimizer.step()
            optimizer.zero_grad()
    return {"steps": steps, "stopped": monitor.stopped or ""}


def test_ranks_with_the_same_rows_are_found_and_all_ranks_obey_the_alert(tmp_path: Path) -> None:
    ranks = spawn(train_on_two_ranks, 2, args=[str(tmp_path / "run")], timeout=100)
    run = um.open_run(tmp_path / "run")
    (alert,) = run.events("alert").to_dict("records")
    assert (alert["rule"], alert["step"], alert["since"]) == ("same_data_on_ranks", 6, 5)
    spread = run.metrics("train/loss_rank_std/total")["train/loss_rank_std/total"]
    assert (spread.loc[:4] > 1e-3).all()
    assert (spread.loc[5:] == 0).all()
    assert (run.metrics("train/seconds_rank_std/total") >= 0).all(axis=None)
    assert [each["steps"] for each in ranks] == [7, 7]
    assert all("rule same_data_on_ranks" in each["stopped"] for each in ranks)

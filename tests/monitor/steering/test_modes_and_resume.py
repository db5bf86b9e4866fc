"""People and policies at the wheel of a plain loop: commands, stopping, resuming, disagreement."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.spawn import spawn
from ulysses_monitor.policies.clipping import AutoClip
from ulysses_monitor.records.command import Command, parse_words
from ulysses_monitor.store.control_file import send_command

LR = 0.05


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model(batch(step)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def monitor_of(path: Path | str, policies: Any = (), **settings: Any) -> um.Monitor:
    return um.Monitor(path, policies=policies, tensorboard=False, rules=[], **settings)


def command(*words: str, why: str = "") -> Command:
    return Command(who="ann", why=why, **parse_words(words))


def halves(_: Sequence[um.StepRecord]) -> list[um.Action]:
    return [um.Action(kind="scale", values={"factor": 0.5})]


def doubles(_: Sequence[um.StepRecord]) -> list[um.Action]:
    return [um.Action(kind="scale", values={"factor": 2.0})]


# -- people -----------------------------------------------------------------------------------


def loop(
    path: Path, said: dict[int, Command], policies: Any = (), steps: int = 6, **watch: Any
) -> tuple[um.Monitor, nn.Module]:
    """A training to which somebody sends commands before some steps."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    monitor = monitor_of(path, policies)
    with monitor.watch(model, optimizer, **watch):
        for step in range(1, steps + 1):
            if step in said:
                send_command(path, said[step])
            one_step(model, optimizer, step)
    return monitor, model


def test_a_factor_stays_until_it_is_one_and_the_event_says_who_and_why(tmp_path: Path) -> None:
    said = {2: command("lr_factor=0.5", why="too fast"), 5: command("lr_factor=1")}
    loop(tmp_path / "run", said)
    run = um.open_run(tmp_path / "run")
    used = run.metrics("optim/lr/0")["optim/lr/0"].tolist()
    assert used == pytest.approx([LR, LR / 2, LR / 2, LR / 2, LR, LR])
    first, second = run.event_list("control")
    assert (first["step"], first["who"], first["why"]) == (2, "ann", "too fast")
    assert (first["command"], first["result"]) == ("learning rate x 0.5", "learning rate x 0.5")
    assert second["step"] == 5


def test_a_policy_is_switched_off_to_shadow_and_on_again(tmp_path: Path) -> None:
    said = {
        2: command("policy=shadow"),
        3: command("policy.halves=active"),
        4: command("policy.doubles=off"),
    }
    loop(tmp_path / "run", said, [halves, doubles], steps=4)
    events = um.open_run(tmp_path / "run").event_list("action")
    assert [(e["step"], e["policy"], e["mode"]) for e in events] == [
        (1, "halves", "active"),
        (1, "doubles", "active"),
        (2, "halves", "shadow"),
        (2, "doubles", "shadow"),
        (3, "halves", "active"),
        (3, "doubles", "shadow"),
        (4, "halves", "active"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy.nobody=off"], "is not in this run; allowed: halves"),
        (["lr_factor.3=0.5"], "parameter group 3 does not exist; allowed: 0 to 0"),
        (["save"], "give watch\\(..., save=\\)"),
    ],
)
def test_an_impossible_command_is_refused_with_an_event_and_changes_nothing(
    tmp_path: Path, words: list[str], message: str
) -> None:
    _, model = loop(tmp_path / "run", {1: command("lr_factor=0.1", *words)}, [halves])
    _, other = loop(tmp_path / "other", {}, [halves])
    (event,) = um.open_run(tmp_path / "run").event_list("control")
    assert re.search(message, event["refused"])
    assert "result" not in event
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_stop_leaves_the_loop_at_the_end_of_the_step_and_save_calls_the_loops_save(
    tmp_path: Path,
) -> None:
    saved: list[int] = []
    said = {2: command("save"), 4: command("stop", why="good enough")}
    monitor, _ = loop(tmp_path / "run", said, save=saved.append)
    assert saved == [2]
    assert monitor.step == 4
    assert monitor.stopped == "ann: good enough"
    run = um.open_run(tmp_path / "run")
    assert run.info["status"] == "stopped"
    assert run.event_list("stop")[-1]["reason"] == "ann: good enough"
    assert run.metrics("grad/norm/total").index.tolist() == [1, 2, 3, 4]


def test_a_control_file_that_others_may_write_is_refused_with_an_event(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with monitor_of(tmp_path / "run").watch(model, optimizer):
        path = tmp_path / "run/control.jsonl"
        path.write_text(command("stop").to_json() + "\n")
        path.chmod(0o666)
        for step in (1, 2, 3):
            one_step(model, optimizer, step)
    events = um.open_run(tmp_path / "run").event_list("control")
    assert len(events) == 1
    assert "mode 666" in events[0]["refused"]


def ranks_under_command(folder: str) -> list[Tensor]:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    monitor = monitor_of(f"{folder}/run", [doubles])
    with monitor.watch(model, optimizer):
        for step in range(1, 7):
            if rank == 0 and step == 3:
                send_command(Path(folder, "run"), command("policy=off", "lr_factor=0.25"))
            if rank == 0 and step == 5:
                send_command(Path(folder, "run"), command("stop"))
            one_step(model, optimizer, 10 * step + rank)
    return [torch.tensor(float(monitor.step)), *(p.detach() for p in model.parameters())]


def test_all_ranks_obey_at_the_same_step(tmp_path: Path) -> None:
    one, other = spawn(ranks_under_command, 2, args=[str(tmp_path)], timeout=60)
    assert one[0] == 5
    assert all(map(torch.equal, one, other))
    run = um.open_run(tmp_path / "run")
    assert [e["step"] for e in run.event_list("action")] == [1, 2]
    used = run.metrics("optim/lr/0")["optim/lr/0"].tolist()
    assert used == pytest.approx([LR, LR, LR / 4, LR / 4, LR / 4])


def test_an_action_that_cannot_be_performed_has_a_note(tmp_path: Path) -> None:
    asked = [
        um.Action(kind="save"),
        um.Action(kind="scale", values={"factor": 0.5}, targets=("nobody.*",)),
        um.Action(kind="lr_factor", values={"factor": 0.5, "group": 4}),
        um.Action(kind="roll_back", values={"steps_back": 1, "skip_steps": 0}),
    ]
    for i, action in enumerate(asked):
        loop(tmp_path / str(i), {}, [lambda _, action=action: [action]], steps=1)
    notes = [um.open_run(tmp_path / str(i)).event_list("action")[0]["note"] for i in range(4)]
    assert notes == [
        "not done: this training cannot save",
        "not done: no trained parameter matches the targets",
        "not done: parameter group 4 does not exist; the optimizer has 1",
        "there is no snapshot to roll back to: the step is skipped",
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_two_monitors_on_one_optimizer_do_not_interfere(tmp_path: Path, turned: bool) -> None:
    def slower(_: Sequence[um.StepRecord]) -> list[um.Action]:
        return [um.Action(kind="lr_factor", values={"factor": 0.5})]

    def sometimes(history: Sequence[um.StepRecord]) -> list[um.Action]:
        factor = um.Action(kind="lr_factor", values={"factor": 0.25})
        return [um.Action(kind="skip") if history[-1].step == 2 else factor]

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    both = [slower, sometimes][:: -1 if turned else 1]
    one, other = (monitor_of(tmp_path / f.__name__, [f]) for f in both)
    weights = []
    with one.watch(model, optimizer), other.watch(model, optimizer):
        for step in (1, 2, 3):
            one_step(model, optimizer, step)
            weights.append([p.detach().clone() for p in model.parameters()])
            assert optimizer.param_groups[0]["lr"] == LR
    by_hand = model_of()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=LR / 8)
    one_step(by_hand, optimizer, 1)
    for expected, found in zip(by_hand.parameters(), weights[0], strict=True):
        torch.testing.assert_close(found, expected.detach())
    assert all(map(torch.equal, weights[0], weights[1]))  # step 2 is skipped
    assert not torch.equal(weights[1][0], weights[2][0])


# -- disagreement -----------------------------------------------------------------------------


def ranks_that_disagree(folder: str, how: str) -> list[float]:
    """The factor that the scale had at each step on this rank, 1 where nothing was done."""
    rank, asked = dist.get_rank(), []

    def decides(history: Sequence[um.StepRecord]) -> list[um.Action]:
        asked.append(history[-1].step)
        odd = how == "decide" and rank == 1 and history[-1].step == 3
        return [
            um.Action(kind="add_noise", values={"std": 0.1}),
            um.Action(kind="clip_rows", values={"ratio": 0.1}),
            um.Action(kind="scale", values={"factor": 3.0 if odd else 2.0}),
        ]

    if how == "fail" and rank == 1:
        from ulysses_monitor.engines import PlainEngine

        original = PlainEngine.set_gradient

        def set_gradient(self: Any, shard: Any, value: Tensor) -> None:
            if asked[-1] == 3:
                raise OSError("out of memory on this rank alone")
            original(self, shard, value)

        PlainEngine.set_gradient = set_gradient  # type: ignore[method-assign]
    model = nn.parallel.DistributedDataParallel(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    logging.disable(logging.CRITICAL)
    with monitor_of(f"{folder}/run", [decides]).watch(model, optimizer):
        for step in range(1, 7):
            one_step(model, optimizer, step)
    return [float(step) for step in asked]


@pytest.mark.parametrize(
    ("how", "message"),
    [("fail", "acting failed on 1 of 2 ranks"), ("decide", "the ranks decided differently")],
)
def test_if_ranks_act_differently_all_stop_acting_one_step_later(
    tmp_path: Path, how: str, message: str
) -> None:
    asked = spawn(ranks_that_disagree, 2, args=[str(tmp_path), how], timeout=60)
    assert asked == [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    (alert,) = um.open_run(tmp_path / "run").event_list("alert")
    assert (alert["rule"], alert["step"], alert["severity"]) == ("policies_disagree", 4, "critical")
    assert message in alert["message"]


# -- resuming and refusing --------------------------------------------------------------------


class Counts:
    """Remembers more than the history."""

    name = "counts"

    def __init__(self) -> None:
        self.count = 0

    def decide(self, history: Sequence[um.StepRecord]) -> list[um.Action]:
        self.count += 1
        return [um.Action(kind="scale", values={"factor": 1.0 + 0.1 * self.count})]

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def resumable(path: Path, first: int, last: int, checkpoint: Path | None = None) -> nn.Module:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    policies = [Counts(), {"autoclip": {"percentile": 50, "warmup": 2}}, {"annealed_noise": {}}]
    monitor = monitor_of(path, policies)
    if first > 1 and checkpoint:
        held = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        monitor.load_state_dict(held["monitor"])
    with monitor.watch(model, optimizer, step=first - 1, max_steps=8):
        for step in range(first, last + 1):
            one_step(model, optimizer, step)
        if checkpoint and first == 1:
            held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(held | {"monitor": monitor.state_dict()}, checkpoint)
    return model


def test_a_plain_loop_that_keeps_the_state_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = resumable(tmp_path / "whole", 1, 8)
    resumable(tmp_path / "run", 1, 4, tmp_path / "c.pt")
    resumed = resumable(tmp_path / "run", 5, 8, tmp_path / "c.pt")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_a_persons_factor_and_modes_survive_a_resume(tmp_path: Path) -> None:
    model, state = model_of(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    monitor = monitor_of(tmp_path / "run", [halves])
    with monitor.watch(model, optimizer):
        send_command(tmp_path / "run", command("lr_factor=0.5", "policy=shadow"))
        one_step(model, optimizer, 1)
        state = monitor.state_dict()
    monitor = monitor_of(tmp_path / "run", [halves])
    monitor.load_state_dict(state)
    with monitor.watch(model, optimizer, step=1):
        one_step(model, optimizer, 2)
    run = um.open_run(tmp_path / "run")
    assert run.metrics("optim/lr/0")["optim/lr/0"].tolist() == pytest.approx([LR / 2, LR / 2])
    assert [e["mode"] for e in run.event_list("action")] == ["shadow", "shadow"]


def test_a_policys_memory_belongs_to_one_training(tmp_path: Path) -> None:
    policy = AutoClip(percentile=50, warmup=2)
    monitor = monitor_of(tmp_path / "run", [policy, Counts()], if_exists="overwrite")
    told = []
    for _ in range(2):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with monitor.watch(model, optimizer):
            for step in range(1, 5):
                one_step(model, optimizer, step)
        events = um.open_run(tmp_path / "run").event_list("action")
        told.append([(e["step"], e["policy"], e["values"]) for e in events])
    assert told[0] == told[1]
    assert policy.memory == {}


def test_a_preset_acts_when_the_number_of_steps_is_unknown(tmp_path: Path) -> None:
    policies = ["ulysses-pro", {"gradient_noise": {"below": 1e6}}]
    loop(tmp_path / "run", {}, policies, steps=2)
    start = um.open_run(tmp_path / "run").event_list("start")[0]["policies"]
    assert set(start) >= {"gradient_noise", "scale_small", "lr_boost"}
    model = model_of()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with monitor_of(tmp_path / "small", "ulysses-pro").watch(model, optimizer):
        one_step(model, optimizer, 1)
    told = {e["policy"] for e in um.open_run(tmp_path / "small").event_list("action")}
    assert {"gradient_noise", "lr_boost", "centralize"} <= told


def test_a_state_that_cannot_be_saved_costs_only_that_policys_memory(tmp_path: Path) -> None:
    class Odd(Counts):
        def state_dict(self) -> Any:
            return {"count": torch.ones(1)}

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    monitor = monitor_of(tmp_path / "run", [Odd(), AutoClip(warmup=0)])
    with monitor.watch(model, optimizer):
        one_step(model, optimizer, 1)
        state = monitor.state_dict()
    monitor = monitor_of(tmp_path / "run", [Counts(), AutoClip(warmup=0)])
    monitor.load_state_dict(state)
    with monitor.watch(model, optimizer, step=1):
        one_step(model, optimizer, 2)


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([{"annealed_noise": {"late": "off"}}], "give watch\\(..., max_steps=\\)"),
        (["warmup_cosine"], "give watch\\(..., max_steps=\\)"),
        ([{"spike_escalation": {}}], "train/loss/total is not collected: give the loss"),
        ([{"clip_threshold": {"metric": "grad/nrm/total"}}], "did you mean 'grad/norm/total'"),
        (["lr_boost", {"warmup_cosine": {}}], "both set the learning rate"),
    ],
)
def test_policies_that_cannot_work_are_refused_before_the_first_step(
    tmp_path: Path, policies: Any, message: str
) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    before = [p.detach().clone() for p in model.parameters()]
    with (
        pytest.raises(um.InputError, match=message),
        monitor_of(tmp_path / "run", policies).watch(model, optimizer),
    ):
        one_step(model, optimizer, 1)
    assert all(map(torch.equal, before, model.parameters()))

"""Policies act through the monitor, say what they did, and in shadow mode touch nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.spawn import spawn
from ulysses_monitor.session.opening import Training

LR = 0.1
Schedule = Callable[[torch.optim.Optimizer], Any]


def model_of(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))


def batch(step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def train(
    path: Path,
    policies: Sequence[Any] = (),
    *,
    steps: int = 4,
    shadow: bool = False,
    schedule: Schedule | None = None,
    poison: int = 0,
    groups: Callable[[nn.Module], Any] = lambda m: m.parameters(),
    watched: bool = True,
) -> tuple[nn.Module, list[float]]:
    """The model at the end, and the scheduled learning rate after each step."""
    model = model_of()
    optimizer = torch.optim.SGD(groups(model), lr=LR)
    scheduler = schedule(optimizer) if schedule else None
    rates = []

    def loop() -> None:
        for step in range(1, steps + 1):
            loss = model(batch(step)).square().sum()
            (loss * math.nan if step == poison else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])

    if watched:
        monitor = um.Monitor(path, policies=policies, shadow=shadow, tensorboard=False, rules=[])
        with monitor.watch(model, optimizer):
            loop()
    else:
        loop()
    return model, rates


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, weights(one), weights(other)))


def doubles(history: Sequence[um.StepRecord]) -> list[um.Action]:
    norm = history[-1]["grad/norm/total"]
    reason = "twice the gradient"
    return [
        um.Action(
            kind="scale", values={"factor": 2.0}, reason=reason, read={"grad/norm/total": norm}
        )
    ]


def warms(history: Sequence[um.StepRecord]) -> list[um.Action]:
    return [um.Action(kind="lr_factor", values={"factor": 3.0})] if len(history) == 2 else []


# -- acting -----------------------------------------------------------------------------------


def test_a_function_of_the_history_acts_and_its_action_is_an_event(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "run", [doubles], steps=1)
    by_hand = model_of()
    by_hand(batch(1)).square().sum().backward()
    for param, found in zip(by_hand.parameters(), weights(model), strict=True):
        assert param.grad is not None
        torch.testing.assert_close(found, param.detach() - LR * 2.0 * param.grad)
    run = um.open_run(tmp_path / "run")
    (event,) = run.event_list("action")
    assert (event["step"], event["policy"], event["action"]) == (1, "doubles", "scale")
    assert (event["mode"], event["values"], event["tensor_count"]) == ("active", {"factor": 2.0}, 4)
    assert event["reason"] == "twice the gradient"
    norm = float(run.metrics("grad/norm/total").iloc[0, 0])
    assert event["norm_before"] == pytest.approx(norm)
    assert event["norm_after"] == pytest.approx(2 * norm)
    assert event["read"]["grad/norm/total"] == pytest.approx(norm)


def test_in_shadow_mode_weights_are_bit_equal_to_an_unwatched_training(tmp_path: Path) -> None:
    policies = [doubles, warms, lambda _: [um.Action(kind="add_noise", values={"std": 1.0})]]
    shadow, _ = train(tmp_path / "run", policies, shadow=True)
    alone, _ = train(tmp_path / "none", watched=False)
    active, _ = train(tmp_path / "active", policies)
    assert equal(shadow, alone)
    assert not equal(active, alone)
    events = um.open_run(tmp_path / "run").events("action")
    assert set(events["mode"]) == {"shadow"}
    assert len(events) == 4 + 1 + 4
    # The first decisions are those of the active run: later ones have other gradients to go by.
    assert events["policy"].tolist()[:2] == ["doubles", "<lambda>"]


def test_the_clipping_coefficient_is_that_of_the_edited_gradient(tmp_path: Path) -> None:
    from ulysses_monitor.engines import find_engine

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine = find_engine(model, optimizer, clip_norm=lambda: 1.0)
    sink = um.MemorySink()
    monitor = um.Monitor(
        tmp_path / "run", policies=[doubles], sinks=[sink], tensorboard=False, rules=[]
    )
    session = monitor.open(engine, Training())
    model(batch(1)).square().sum().backward()
    session.gradients_ready()
    session.stepped()
    session.step_ends()
    session.close()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (record,) = sink.records
    assert record["grad/clip_coef/total"] == pytest.approx(float(1.0 / norm), rel=1e-4)
    assert record["grad/norm/total"] == pytest.approx(float(norm) / 2)  # what the engine made


# -- the learning rate ------------------------------------------------------------------------

SCHEDULES: dict[str, Schedule] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda _: 0.5),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=10),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_factor_lasts_one_step_and_never_compounds_with_a_scheduler(
    tmp_path: Path, name: str
) -> None:
    _, plain = train(tmp_path / "plain", schedule=SCHEDULES[name])
    _, rates = train(tmp_path / "run", [warms], schedule=SCHEDULES[name])
    assert rates == plain  # the scheduler's own, bit by bit
    used = um.open_run(tmp_path / "run").metrics("optim/lr/0")["optim/lr/0"]
    scheduled = um.open_run(tmp_path / "plain").metrics("optim/lr/0")["optim/lr/0"]
    assert used.tolist() == pytest.approx((scheduled * [1.0, 3.0, 1.0, 1.0]).tolist(), rel=1e-6)


def test_a_factor_applies_to_the_step_and_to_one_group_only(tmp_path: Path) -> None:
    def groups(model: nn.Module) -> Any:
        first, second = list(model[0].parameters()), list(model[3].parameters())  # type: ignore[index]
        return [{"params": first, "lr": LR}, {"params": second, "lr": 16 * LR}]

    def second(_: Sequence[um.StepRecord]) -> list[um.Action]:
        return [um.Action(kind="lr_factor", values={"factor": 0.0, "group": 1})]

    model, _ = train(tmp_path / "run", [second], groups=groups, steps=1)
    start = model_of()
    assert torch.equal(model[3].weight, start[3].weight)  # type: ignore[index]
    assert not torch.equal(model[0].weight, start[0].weight)  # type: ignore[index]
    rates = um.open_run(tmp_path / "run").metrics("optim/lr/*").iloc[0]
    assert rates.tolist() == pytest.approx([LR, 0.0])


def test_a_loop_that_fails_within_a_step_gets_its_rate_back(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def always(_: Sequence[um.StepRecord]) -> list[um.Action]:
        return [um.Action(kind="lr_factor", values={"factor": 5.0})]

    monitor = um.Monitor(tmp_path / "run", policies=[always], tensorboard=False)
    with pytest.raises(RuntimeError, match="mine"), monitor.watch(model, optimizer):  # noqa: PT012
        model(batch(1)).sum().backward()
        monitor.before_clip()
        assert optimizer.param_groups[0]["lr"] == 5 * LR
        raise RuntimeError("mine")
    assert optimizer.param_groups[0]["lr"] == LR


# -- standing back, failing, wrong input ------------------------------------------------------


def test_policies_are_not_asked_when_gradients_are_not_finite(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "run", [doubles], steps=3, poison=3)
    before, _ = train(tmp_path / "before", [doubles], steps=2)
    assert equal(model, before)  # the step is left out
    events = um.open_run(tmp_path / "run").event_list("action")
    assert [(e["step"], e["policy"]) for e in events[:2]] == [(1, "doubles"), (2, "doubles")]
    (last,) = events[2:]
    assert (last["step"], last["policy"], last["action"]) == (3, "nonfinite", "skip")
    assert last["targets"] == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_a_policy_that_raises_does_not_affect_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def broken(history: Sequence[um.StepRecord]) -> list[um.Action]:
        asked.append(history[-1].step)
        raise ZeroDivisionError

    def wrong(_: Sequence[um.StepRecord]) -> Any:
        return ["scale"]

    model, _ = train(tmp_path / "run", [broken, wrong, doubles], steps=6)
    other, _ = train(tmp_path / "other", [doubles], steps=6)
    assert asked == [1, 2, 3]
    assert equal(model, other)
    assert caplog.text.count("policy broken failed") == 1
    assert caplog.text.count("policy broken is switched off") == 1
    assert "returned a str; expected um.Action" in caplog.text
    events = um.open_run(tmp_path / "run").events("monitor")
    assert [*zip(events["part"], events["state"], events["step"], strict=True)] == [
        ("policy broken", "failed", 0),
        ("policy wrong", "failed", 0),
        ("policy broken", "off", 2),
        ("policy wrong", "off", 2),
    ]


def test_a_defect_in_the_steering_never_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError("a defect of ours")

    monkeypatch.setattr("ulysses_monitor.steering.steering.PolicySet.decide", broken)
    model, _ = train(tmp_path / "run", [doubles])
    alone, _ = train(tmp_path / "none", watched=False)
    assert equal(model, alone)
    assert len(um.open_run(tmp_path / "run").metrics("train/*", "grad/norm/total")) == 4
    assert caplog.text.count("steering is switched off") == 1


def test_policies_with_the_same_name_get_distinct_names(tmp_path: Path) -> None:
    train(tmp_path / "run", [doubles, doubles], steps=1)
    assert um.open_run(tmp_path / "run").events("action")["policy"].tolist() == [
        "doubles",
        "doubles-2",
    ]


class NoDecide:
    name = "no decide"


@pytest.mark.parametrize("policies", ["all", [NoDecide()], [um.MemorySink], 3])
def test_an_object_that_is_not_a_policy_is_refused_at_once(tmp_path: Path, policies: Any) -> None:
    with pytest.raises(um.InputError, match=r"policy|policies"):
        um.Monitor(tmp_path / "run", policies=policies)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "add_nose"}, "did you mean 'add_noise'"),
        ({"kind": "add_noise"}, "expected \\['std'\\]"),
        ({"kind": "scale", "values": {"factor": math.nan}}, "factor is nan"),
        ({"kind": "clip_norm", "values": {"max_norm": -1.0}}, "max_norm is -1.0"),
        ({"kind": "lr_factor", "values": {"factor": 1.0, "groups": 1}}, "values are"),
    ],
)
def test_an_action_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(um.InputError, match=message):
        um.Action(**settings)


# -- replicas ---------------------------------------------------------------------------------


def replicas_after(steps: int, folder: str) -> list[Tensor]:
    """With dropout, and random numbers used unevenly by the ranks."""
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(model_of(dropout=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)

    def acts(history: Sequence[um.StepRecord]) -> list[um.Action]:
        return [
            um.Action(kind="add_noise", values={"std": 0.1}),
            um.Action(kind="centralize"),
            um.Action(kind="clip_rows", values={"ratio": 0.1}),
            um.Action(kind="clip_norm", values={"max_norm": 1.0}),
            um.Action(kind="lr_factor", values={"factor": 1.0 + 0.1 * (len(history) % 3)}),
        ]

    monitor = um.Monitor(f"{folder}/run", policies=[acts], tensorboard=False, rules=[])
    with monitor.watch(model, optimizer):
        for step in range(steps):
            torch.randn(1 + 7 * rank)
            model(batch(100 * rank + step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_replicas_stay_bit_equal(tmp_path: Path) -> None:
    one, other = spawn(replicas_after, 2, args=[50, str(tmp_path)], timeout=100)
    assert all(map(torch.equal, one, other))
    run = um.open_run(tmp_path / "run")
    assert len(run.events("action")) == 250
    assert (run.metrics("param/mismatch/total").dropna() == 0).all().all()

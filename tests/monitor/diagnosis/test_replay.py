"""A replay of a recorded run says what was said while it trained."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.recorded import curve, write_run
from ulysses_monitor.diagnosis.replay import (
    fit_to_run,
    replay_policies,
    replay_rules,
    trained_steps,
)
from ulysses_monitor.records import StepRecord
from ulysses_monitor.records.json_ready import event_to_dict
from ulysses_monitor.rules import RuleSet, default_rules
from ulysses_monitor.store import RunDirectory, compact

POISONED, WITHOUT_LABELS, SPIKE = 7, 11, 78
SAID = ("step", "policy", "action", "values", "targets", "reason", "read")


class Adapted(nn.Module):
    """A linear layer with a LoRA adapter, named as PEFT names it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        nn.init.normal_(self.lora_B["default"].weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


class Training:
    """A small training with all that a record can hold.

    Of some steps the loss is NaN, no label counts, or it is far too large; metrics are added from
    a source, and beside the steps.
    """

    def __init__(self, adapters: bool = False) -> None:
        torch.manual_seed(0)
        first = Adapted() if adapters else nn.Linear(4, 8)
        self.model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def run(
        self,
        monitor: um.Monitor,
        first: int,
        last: int,
        max_steps: int | None,
        seed: int = 0,
        after: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Trains these steps; gives what a checkpoint of the last holds."""
        with monitor.watch(self.model, self.optimizer, step=first - 1, max_steps=max_steps):
            assert monitor.session is not None
            monitor.session.sources.add(["mine/thing/total"], lambda: [1 / 3])
            monitor.log({"bench/score/total": 0.1})
            for step in range(first, last + 1):
                self._step(monitor, step, seed)
                if step % 4 == 0:
                    monitor.log({"eval/loss/total": 1.0, "bench/score/total": 0.1 * step})
                    monitor.log({"bench/other/total": float(step)})
                after(step)
            return {
                "model": {k: v.clone() for k, v in self.model.state_dict().items()},
                "monitor": monitor.state_dict(),
            }

    def _step(self, monitor: um.Monitor, step: int, seed: int) -> None:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1000 * seed + step))
        loss = self.model(x).square().mean()
        loss = loss * {POISONED: math.nan, SPIKE: 1e6}.get(step, 0.1 ** (step // 5 % 4))
        loss.backward()
        labels = 0 if step == WITHOUT_LABELS else 6
        monitor.observe(loss=loss, tokens=6, loss_tokens=labels)
        if step == POISONED:  # the weights stay finite, so that the training goes on
            monitor.before_clip()
            for param in self.model.parameters():
                param.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()


CARRIED = "grad/carried/total"


def trained(path: Path, policies: Any, steps: int = 30, **settings: Any) -> um.RunReader:
    plan = settings.pop("max_steps", 40)
    training = Training(settings.pop("adapters", False))
    training.run(monitor_of(path, policies, **settings), 1, steps, plan)
    return um.open_run(path)


def monitor_of(path: Path, policies: Any = (), **settings: Any) -> um.Monitor:
    # Alerts name rows, which a run read again does not have at hand.
    own = {"shadow": True, "tensorboard": False, "sample_every": 3, "rules": [], "rows": "off"}
    return um.Monitor(path, policies=policies, **own | settings)


def fingerprint(history: Sequence[um.StepRecord]) -> list[um.Action]:
    """Depends on every name and every bit of the newest record, and on the steps of all.

    Memory counts by its name alone: two trainings that are the same differ in it.
    """
    record = history[-1]
    values = {n: 0 if n.startswith("system/") else v for n, v in record.to_dict().items()}
    told = sorted(values.items()), [past.step for past in history]
    reason = f"{zlib.crc32(repr(told).encode()):08x}"
    read = {name: record[name] for name in record.schema.names[:3]}
    return [um.Action(kind="skip", reason=reason, read=read)]


def fails_at_first(history: Sequence[um.StepRecord]) -> list[um.Action]:
    if len(history) < 2:
        raise ZeroDivisionError
    return [um.Action(kind="stop")] if history[-1].step % 5 == 0 else []


class Counts:
    """A user's policy with a memory of its own."""

    name = "counts"

    def __init__(self) -> None:
        self.seen = 0

    def decide(self, history: Sequence[um.StepRecord]) -> list[um.Action]:
        self.seen += 1
        return [um.Action(kind="save", reason=f"seen {self.seen}")]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


SPIKES = {"warmup": 4, "window": 12, "sigmas": 1.5, "snapshot_every": 5, "steps_back": 5, "hold": 4}
SETS: dict[str, Callable[[], list[Any]]] = {
    "a preset": lambda: ["ulysses-pro"],
    "a preset and functions": lambda: ["ulysses-pro", fingerprint, fails_at_first],
    "spikes": lambda: [
        {"spike_escalation": {**SPIKES, "late": {"sigmas": 0.5}}},
        {"skip_outliers": {"warmup": 3, "window": 8, "sigmas": 1.0}},
    ],
    "clipping": lambda: [
        "autoclip",
        {"zclip": {"warmup": 3, "z": 0.5, "late": "off", "late_start": 0.5}},
        {"adagc": {"warmup": 4}},
        {"autoclip": {"percentile": 50.0, "late": {"percentile": 90.0}, "late_start": 0.3}},
        {"autoclip": {"name": "none", "mode": "off"}},
    ],
    "a schedule": lambda: ["warmup_cosine", {"freeze": {"targets": ["*bias"]}}, "agc"],
    "a memory": lambda: [Counts(), "annealed_noise"],
}


def recorded(run: um.RunReader) -> list[tuple[Any, ...]]:
    """What ``events.jsonl`` says was decided."""
    return [tuple(event[key] for key in SAID) for event in run.event_list("action")]


def replayed(run: um.RunReader, policies: Any) -> list[tuple[Any, ...]]:
    events = [event_to_dict(event) for event in replay_policies(run, policies)]
    events = json.loads(json.dumps(events))
    return [tuple(event[key] for key in SAID) for event in events]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs keep the parts they were written in."""
    monkeypatch.setattr("ulysses_monitor.store.sink.is_small", lambda _: False)


# -- policies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
@pytest.mark.usefixtures("parts")
def test_a_replay_decides_what_was_decided_before_and_after_compaction(
    tmp_path: Path, name: str
) -> None:
    run = trained(tmp_path / "run", SETS[name]())
    told = recorded(run)
    assert (POISONED, "nonfinite", "skip") in [row[:3] for row in told]
    assert len(told) > 5
    assert replayed(run, SETS[name]()) == told
    assert compact(tmp_path / "run/metrics") == {}
    assert [p.name for p in (tmp_path / "run/metrics").iterdir()] == ["metrics.parquet"]
    assert replayed(um.open_run(tmp_path / "run"), SETS[name]()) == told


def test_adapters_are_balanced_at_the_same_steps_by_the_same_ratios(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", ["ulysses-pro"], adapters=True)
    told = recorded(run)
    balanced = [row for row in told if row[1] == "lora_balance"]
    assert balanced
    assert all("lora/grad_ratio_B_A/module/0" in row[-1] for row in balanced)
    assert replayed(run, ["ulysses-pro"]) == told


@pytest.mark.parametrize("max_steps", [None, 100])
def test_functions_see_all_that_was_known_and_nothing_that_came_later(
    tmp_path: Path, max_steps: int | None
) -> None:
    seen: list[list[str]] = []

    def looks(history: Sequence[um.StepRecord]) -> list[um.Action]:
        seen.append(sorted(history[-1].schema.names))
        return []

    run = trained(tmp_path / "run", [looks, fingerprint], max_steps=max_steps)
    live, seen = seen, []
    assert replayed(run, [looks, fingerprint]) == recorded(run)
    assert live == seen
    assert ("train/max_steps/total" in live[0]) == (max_steps is not None)
    assert "mine/thing/total" in live[0]
    assert "optim/exp_avg_norm/total" in live[3]
    later = ("bench/", "eval/", "monitor/", "optim/update_ratio/", "train/step_seconds/")
    assert not [name for names in live for name in names if name.startswith(later)]


def test_a_live_run_can_be_replayed(tmp_path: Path) -> None:
    policies, run_dir = ["autoclip", fingerprint], tmp_path / "run"
    found: list[list[tuple[Any, ...]]] = []

    def looks(step: int) -> None:
        if step == 20:
            run, deadline = um.open_run(run_dir), time.monotonic() + 60
            while len(trained_steps(run)) < 19 and time.monotonic() < deadline:
                time.sleep(0.05)
            found.append(replayed(run, policies))

    Training().run(monitor_of(run_dir, policies), 1, 30, None, after=looks)
    told = recorded(um.open_run(run_dir))
    assert found[0] == told[: len(found[0])]
    assert found[0][-1][0] >= 19


@pytest.mark.usefixtures("parts")
def test_a_long_run_is_replayed_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = ["ulysses-pro", fingerprint]
    run = trained(tmp_path / "run", policies)
    alerts = replay_rules(run, ["default", forgets_nothing]).events
    assert len(alerts) > 30
    monkeypatch.setattr("ulysses_monitor.diagnosis.recorded_steps._CHUNK", 7)
    monkeypatch.setattr("ulysses_monitor.reading.chunks._VALUES", 300)
    monkeypatch.setattr("ulysses_monitor.reading.chunks._MEMORY_BYTES", 1)
    assert replayed(run, policies) == recorded(run)
    again = replay_rules(run, ["default", forgets_nothing]).events
    assert list(map(repr, again)) == list(map(repr, alerts))  # NaN is not equal to itself


def forgets_nothing(history: Sequence[um.StepRecord]) -> list[um.Alert]:
    """Says every name and every bit of all records, under a name that each step has anew."""
    record = history[-1]
    told = [sorted(past.to_dict().items()) for past in history]
    return [
        um.Alert(
            rule="all",
            step=record.step,
            metric=f"all/{record.step}/total",
            value=float(len(history)),
            threshold=0.0,
            message=f"{zlib.crc32(repr(told).encode()):08x}",
            hint="",
        )
    ]


def test_a_replay_of_a_run_without_policies_shows_what_they_would_have_decided(
    tmp_path: Path,
) -> None:
    trained(tmp_path / "with", ["autoclip", fingerprint])
    run = trained(tmp_path / "without", [])
    assert not recorded(run)
    assert replayed(run, ["autoclip", fingerprint]) == recorded(um.open_run(tmp_path / "with"))


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize("compacted", [True, False])
def test_a_resumed_run_is_replayed_as_it_finally_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: bool, compacted: bool
) -> None:
    if not compacted:
        monkeypatch.setattr("ulysses_monitor.store.sink.is_small", lambda _: False)
    policies = ["autoclip", {"zclip": {"warmup": 3, "z": 0.5, "late": "off"}}, fingerprint]
    path, training = tmp_path / "run", Training()
    state = training.run(monitor_of(path, policies), 1, 10, 20)
    training.run(monitor_of(path, policies), 11, 14, 20)  # its checkpoint is lost
    given_up = len(recorded(um.open_run(path)))
    monitor = monitor_of(path, policies)
    if remembered:
        monitor.load_state_dict(state["monitor"])
    training.model.load_state_dict(state["model"])
    training.run(monitor, 11, 25, 30, seed=1)
    told = recorded(um.open_run(path))
    first = [row for row in told[:given_up] if row[0] <= 10]
    assert {row[0] for row in told[given_up:]} >= {11, 14, 25}
    assert replayed(um.open_run(path), policies) == first + told[given_up:]


def test_a_presets_policy_that_cannot_act_is_left_out_and_a_named_one_is_refused(
    tmp_path: Path,
) -> None:
    run = trained(tmp_path / "run", [], max_steps=None)
    fit = fit_to_run(run, ["adaptive"])
    assert [policy.name for policy in fit.policies] == ["lift_vanishing", "spike_escalation"]
    assert "the model has no adapters" in fit.left_out["lora_balance"]
    for policy, message in (
        ("lora_balance", "has no adapters"),
        ("warmup_cosine", "number of steps, which is not known"),
        ({"clip_threshold": {"metric": "eval/loss/total"}}, "is not collected"),
        ({"clip_threshold": {"metric": "bench/score/total"}}, "is not collected"),
    ):
        with pytest.raises(um.InputError, match=message):
            replay_policies(run, [policy])
    told = replayed(run, [{"clip_threshold": {"metric": "mine/thing/total", "above": 0.1}}])
    assert [row[0] for row in told if row[1] == "clip_threshold"] == [
        step for step in range(1, 31) if step != POISONED
    ]
    assert replay_policies(run, [{"lora_balance": {"mode": "off"}}]) == []


def test_a_metric_that_a_training_collects_but_never_has_is_not_an_error(tmp_path: Path) -> None:
    policies = [{"clip_threshold": {"metric": "optim/exp_avg_norm/total"}}, "autoclip"]
    run = trained(tmp_path / "run", policies, steps=3)
    assert "optim/exp_avg_norm/total" not in run.names()
    assert replayed(run, policies) == recorded(run) == []


def test_policies_that_could_not_act_together_can_be_compared(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", [])
    both = replayed(run, ["ulysses-pro", {"spike_escalation": SPIKES}])
    assert {"lr_boost", "spike_escalation"} < {row[1] for row in both}


def test_a_replay_leaves_the_policies_and_the_run_as_they_are(tmp_path: Path) -> None:
    counts, run = Counts(), trained(tmp_path / "run", [])
    counts.seen = 3
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}
    first = replayed(run, [counts, fingerprint])
    replay_rules(run, "default")
    assert counts.seen == 3
    assert replayed(run, [counts, fingerprint]) == first
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")} == before


def test_builtin_policies_read_only_their_own_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = trained(tmp_path / "run", []), []
    block = um.RunReader.block
    monkeypatch.setattr(
        um.RunReader, "block", lambda self, *p, **k: (asked.append(p), block(self, *p, **k))[1]
    )
    replay_policies(run, ["autoclip"])
    assert all(asked)
    assert not [p for patterns in asked for p in patterns if p in ("grad/*", "*")]


def test_a_run_without_steps_has_no_decisions_and_no_alerts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    assert replay_policies(run, ["spike_escalation"]) == []
    assert replay_rules(run, "default").events == []
    with pytest.raises(um.InputError, match="did you mean 'zclip'"):
        replay_policies(run, ["zlip"])


def test_malformed_events_are_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", curve("grad/norm/total", [1.0] * 12 + [9.0] * 3))
    (tmp_path / "run/events.jsonl").write_text(
        '{"kind": "start", "step": "x", "max_steps": "many", "policies": 3}\n'
        '{"kind": "monitor", "step": 1, "policies_anew": 3}\n{"kind": "start", "step": 5}\n'
    )
    assert [row[0] for row in replayed(run, ["autoclip"])] == [13, 14, 15]


def test_a_trainers_own_log_can_be_replayed(tmp_path: Path) -> None:
    log = [{"step": s, "loss": 2.0 - s / 100, "grad_norm": 1.0 + s % 2} for s in range(1, 40)]
    log[30]["grad_norm"] = 100.0
    log.append({"step": 39, "eval_loss": 1.0})
    state = {"log_history": log, "global_step": 39, "max_steps": 40}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    told = replayed(um.open_run(tmp_path), [{"zclip": {"late": "off"}}, fingerprint])
    assert [row[0] for row in told if row[1] == "zclip"] == [31]
    assert len(told) == 1 + 39


# -- rules ------------------------------------------------------------------------------------


class Looks:
    """A rule that says which metrics each step has, and asks about what came with the next one."""

    name = "looks"

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[str, ...]]] = []

    def check(self, history: Sequence[StepRecord]) -> list[um.Alert]:
        record = history[-1]
        self.seen.append((record.step, tuple(sorted(record.schema.names))))
        found = record.get("optim/update_ratio/total")
        if not found > 0:
            return []
        return [
            um.Alert(
                rule=self.name,
                step=record.step,
                metric="optim/update_ratio/total",
                value=found,
                threshold=0.0,
                message=f"{len(history)} steps",
            )
        ]


def alerts_of(events: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    exact = ("step", "rule", "metric", "message", "hint", "severity")
    return [tuple(event[key] for key in exact) for event in events]


def numbers_of(events: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(event[key]) for event in events for key in ("value", "threshold")]


@pytest.mark.parametrize("compacted", [True, False])
def test_rules_raise_the_same_alerts_as_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compacted: bool
) -> None:
    if not compacted:
        monkeypatch.setattr("ulysses_monitor.store.sink.is_small", lambda _: False)
    live, later = Looks(), Looks()
    run = trained(tmp_path / "run", [], steps=80, rules=[*default_rules(), live])
    told = run.event_list("alert")
    steps = {(event["rule"], event["step"]) for event in told}
    assert {("nonfinite", 7), ("no_labels", 11), ("gradient_spike", 78), ("looks", 1)} < steps
    found = [event_to_dict(event) for event in replay_rules(run, [*default_rules(), later]).events]
    assert alerts_of(found) == alerts_of(told)
    np.testing.assert_allclose(numbers_of(found), numbers_of(told), rtol=1e-6)
    assert dict(live.seen) == dict(later.seen)  # the steps when all of them was known


def test_rules_start_without_history_when_a_training_resumes(tmp_path: Path) -> None:
    path, training, live, later = tmp_path / "run", Training(), Looks(), Looks()
    training.run(monitor_of(path, rules=[*default_rules(), Looks()]), 1, 10, 20)
    given_up = len(um.open_run(path).event_list("alert"))
    training.run(monitor_of(path, rules=[*default_rules(), live]), 5, 20, 20, seed=1)
    run = um.open_run(path)
    told = [
        event
        for i, event in enumerate(run.event_list("alert"))
        if i >= given_up or event["step"] <= 4
    ]
    found = [event_to_dict(event) for event in replay_rules(run, [*default_rules(), later]).events]
    assert alerts_of(found) == alerts_of(told)
    # At the first step after a resume it is not known, and that of the training given up is read.
    expected = {step: [n for n in names if n != CARRIED] for step, names in later.seen if step > 4}
    assert {step: [n for n in names if n != CARRIED] for step, names in live.seen} == expected


def test_a_rule_that_raises_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "run", [])
    sound = alerts_of([event_to_dict(e) for e in replay_rules(run, "default").events])
    assert sound

    class Broken:
        name = "broken"

        def check(self, history: Sequence[StepRecord]) -> list[um.Alert]:
            raise ZeroDivisionError

    found = [event_to_dict(e) for e in replay_rules(run, [Broken(), *default_rules()]).events]
    assert alerts_of(found) == sound
    assert RuleSet([]).observe(StepRecord.of(1, 0.0, {"a/a/a": 1.0})) == []
    with pytest.raises(um.InputError, match="an object of type int is not a rule"):
        replay_rules(run, [3])  # type: ignore[list-item]


def test_a_replay_does_not_need_the_run_in_memory(tmp_path: Path) -> None:
    trained(tmp_path / "run", [])
    directory = RunDirectory(tmp_path / "run", "resume")  # as a training that goes on
    try:
        assert replay_policies(um.open_run(tmp_path / "run"), ["autoclip"])
    finally:
        directory.release()

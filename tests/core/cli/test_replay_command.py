"""`ulysses replay`: what would have fired in a run, and at which steps."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

Ulysses = Callable[..., tuple[int, str, str]]
POISONED = 5

ALERTS_AT_7 = """
import ulysses_monitor as um

def at_7(history):
    step = history[-1].step
    alert = um.Alert(
        rule="at_7", step=step, metric="a/b/total", value=1.0, threshold=0.0, message="seen"
    )
    return [alert] if step == 7 else []
"""

TWICE = """
import ulysses_monitor as um

def skips_even(history):
    even = history[-1].step % 2 == 0
    return [um.Action(kind="skip", reason="it is [bold]even\\x1b[0m")] if even else []
"""


@pytest.fixture(autouse=True)
def path_of_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 60 steps in shadow mode, with a step that is not finite."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    path = tmp_path / "runs/one"
    policies = ["ulysses-pro", "autoclip"]
    monitor = um.Monitor(path, policies=policies, shadow=True, tensorboard=False, sample_every=3)
    with monitor.watch(model, optimizer, max_steps=60):
        for step in range(1, 61):
            loss = model(torch.randn(6, 4)).square().mean() * 0.1 ** (step // 10 % 6)
            (loss * math.nan if step == POISONED else loss).backward()
            monitor.observe(loss=loss)
            if step == POISONED:
                monitor.before_clip()
                for param in model.parameters():
                    param.grad = None
            optimizer.step()
            optimizer.zero_grad()
    return path


def write(path: Path, losses: list[float]) -> None:
    directory = RunDirectory(path)
    directory.start({})
    sink = StoreSink(directory)
    sink.write(Event(kind="start", step=0, time=0.0, data={"max_steps": 100}))
    for step, loss in enumerate(losses, 1):
        sink.write(StepRecord.of(step, float(step), {"train/loss/total": loss}))
    sink.close()
    directory.finish("finished")


def test_decisions_are_summarized_and_listed(ulysses: Ulysses, run: Path) -> None:
    given = ("--policies", "ulysses-pro", "--policies", "autoclip")
    code, out, error = ulysses("replay", "runs/one", *given, "--all")
    assert (code, error) == (0, "")
    told = um.open_run(run).event_list("action")
    head, _, *lines = out.splitlines()
    assert head == "runs/one: 60 steps, 1 to 60"
    assert lines[0].split() == ["policy", "decisions", "first", "last", "kinds"]
    summary = {line.split()[0]: line.split()[1:] for line in lines[1:8]}
    clipped = [event["step"] for event in told if event["policy"] == "autoclip"]
    number = str(len(clipped))
    assert summary["autoclip"] == [number, str(clipped[0]), str(clipped[-1]), "clip_norm", number]
    assert summary["clip_threshold"][0] == "0"
    assert summary["nonfinite"] == ["1", "5", "5", "skip", "1"]
    assert lines[8].startswith("skipped lora_balance: its metric lora/grad_ratio_B_A/total is not")
    assert lines[10].split() == ["step", "policy", "action", "values", "reason"]
    rows = [line.split()[:3] for line in lines[11:]]
    assert rows == [[str(e["step"]), e["policy"], e["action"]] for e in told]
    assert re.search(r"factor 1\.2 +grad/abs_mean/tensor_mean is below 0\.001", out)


def test_only_the_first_decisions_are_shown_without_all(ulysses: Ulysses, run: Path) -> None:
    number = len(um.open_run(run).event_list("action"))
    given = ("--policies", "ulysses-pro", "--policies", "autoclip")
    *_, last = ulysses("replay", "runs/one", *given)[1].splitlines()
    assert last == f"and {number - 50} decisions more; use --all to show them"


def test_json_has_the_summary_and_all_decisions(ulysses: Ulysses, run: Path) -> None:
    given = ("--policies", "ulysses-pro", "--policies", "autoclip", "--rules", "default")
    code, out, error = ulysses("replay", "runs/one", *given, "--json")
    assert (code, error) == (0, "")
    answer = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (answer["run"], answer["steps"]) == ("runs/one", {"count": 60, "first": 1, "last": 60})
    told = um.open_run(run).event_list("action")
    found = answer["policies"]["decisions"]
    keys = ("step", "policy", "action", "values", "targets", "reason", "read")
    assert [[e[k] for k in keys] for e in found] == [[e[k] for k in keys] for e in told]
    assert "lora_balance" in answer["policies"]["left_out"]
    assert answer["policies"]["summary"]["nonfinite"] == {
        "count": 1,
        "first": POISONED,
        "last": POISONED,
        "kinds": {"skip": 1},
    }
    alerts = um.open_run(run).event_list("alert")
    assert [(a["step"], a["rule"]) for a in answer["rules"]["alerts"]] == [
        (a["step"], a["rule"]) for a in alerts
    ]


def test_the_default_rules_are_replayed_without_policies(ulysses: Ulysses, run: Path) -> None:
    code, out, error = ulysses("replay", "runs/one")
    assert (code, error) == (0, "")
    assert ulysses("replay", "runs/one", "--rules", "default")[1] == out
    assert "policy" not in out
    nonfinite = next(line.split() for line in out.splitlines() if line.startswith("nonfinite"))
    assert nonfinite == ["nonfinite", "1", "5", "5", "critical", "1"]
    assert "Step 5: 10 gradient elements are NaN or Inf, in " in out


def test_rules_can_be_named_and_come_from_a_file_and_from_the_current_directory(
    ulysses: Ulysses, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_rules.py").write_text(ALERTS_AT_7)
    (tmp_path / "rules.yaml").write_text("rules:\n  - gradient_spike: {window: 16, warmup: 8}\n")
    given = [
        word for name in ("nonfinite", "my_rules:at_7", "rules.yaml") for word in ("--rules", name)
    ]
    code, out, error = ulysses("replay", "runs/one", *given, "--json")
    assert (code, error) == (0, "")
    rules = json.loads(out)["rules"]
    assert list(rules["summary"]) == ["nonfinite", "at_7", "gradient_spike"]
    assert [a["step"] for a in rules["alerts"] if a["rule"] == "at_7"] == [7]


def test_policies_come_from_a_file_and_from_the_current_directory(
    ulysses: Ulysses, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "of_my_own.py").write_text(TWICE)
    (tmp_path / "mine.yaml").write_text(
        "policies:\n  - of_my_own:skips_even: {name: third, mode: active}\n  - autoclip:\n"
    )
    given = ("--policies", "of_my_own:skips_even", "--policies", "mine.yaml", "--policies")
    code, out, error = ulysses("replay", "runs/one", *given, "autoclip")
    assert (code, error) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    summary = {words[0]: words[1:] for words in lines[3:8]}
    assert summary["skips_even"] == summary["third"] == ["30", "2", "60", "skip", "30"]
    assert summary["autoclip"] == summary["autoclip-2"]
    assert "\x1b" not in out
    assert "it is [bold]even\ufffd[0m" in out


def test_a_run_without_decisions_or_alerts_says_so(ulysses: Ulysses, tmp_path: Path) -> None:
    write(tmp_path / "calm", [2.0, 1.5])
    code, out, _ = ulysses("replay", "calm", "--policies", "agc:")  # a typo, and no policy
    assert (code, out) == (2, "")
    clip = ("--policies", "clip.yaml")
    (tmp_path / "clip.yaml").write_text("- clip_threshold: {metric: train/loss/total}\n")
    code, out, error = ulysses("replay", "calm", *clip, "--rules", "default")
    assert (code, error) == (0, "")
    assert out.startswith("calm: 2 steps, 1 to 2\n")
    assert "\nno decisions\n" in out
    assert out.endswith("\nno alerts\n")


def test_a_run_without_metrics_says_so(ulysses: Ulysses, tmp_path: Path) -> None:
    write(tmp_path / "empty", [])
    for given in ((), ("--policies", "spike_escalation")):
        assert ulysses("replay", "empty", *given) == (
            0,
            "empty: no steps were recorded, so there is nothing to replay\n",
            "",
        )
    answer = json.loads(ulysses("replay", "empty", "--policies", "autoclip", "--json")[1])
    assert answer["steps"] == {"count": 0, "first": None, "last": None}
    assert answer["policies"]["decisions"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], "no run.json there"),
        (["calm", "--policies", "autoclp"], "did you mean 'autoclip'"),
        (["calm", "--policies", "lora_balance"], "the model has no adapters"),
        (["calm", "--policies", "nothing.yaml"], "nothing.yaml: No such file"),
        (["calm", "--policies", "nothing:here"], "cannot be imported"),
        (["calm", "--policies", "json:here"], "json has no here"),
        (["calm", "--rules", "mine"], "rules: 'mine' is not a rule"),
    ],
)
def test_wrong_input_is_one_line(
    ulysses: Ulysses, tmp_path: Path, given: list[str], message: str
) -> None:
    write(tmp_path / "calm", [2.0, 1.5])
    code, out, error = ulysses("replay", *given)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error


def test_nothing_is_written(ulysses: Ulysses, run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ulysses("replay", "runs/one", "--policies", "adaptive", "--rules", "default")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

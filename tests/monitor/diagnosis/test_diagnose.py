"""A diagnosis names the fault of a training first, and says what it could not check."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import ulysses_monitor as um
from benchmarks.faults import of_data, of_optimizers, of_weights
from benchmarks.faults.registry import FAULTS, ONSET
from benchmarks.faults.training import Setting, Training
from tests.support.recorded import curve, training, write_run
from ulysses_monitor.diagnosis.brief import LIMIT, summarize_diagnosis
from ulysses_monitor.diagnosis.causality import LEADS_TO, find_chains
from ulysses_monitor.diagnosis.checks import group_reasons
from ulysses_monitor.diagnosis.diagnose import Diagnosis, diagnose
from ulysses_monitor.diagnosis.findings import Finding
from ulysses_monitor.records import Alert, Event
from ulysses_monitor.rules.book import BOOK

_DECLARED = (of_data, of_optimizers, of_weights)

ADAMW = Setting(name="adamw", rate=3e-3, layers=3, width=16, steps=75)
LORA = dataclasses.replace(ADAMW, name="lora", lora=4, rate=5e-3)

Trained = Callable[[str, Setting], Diagnosis]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains with a fault, or with none if it has no name, and diagnoses the recorded run."""

    def train(fault: str, setting: Setting) -> Diagnosis:
        place = tmp_path_factory.mktemp("runs") / "run"
        broken = Training(setting)
        if fault:
            FAULTS[fault].breaks(broken)
        broken.run(place)
        return diagnose(um.open_run(place))

    return train


def alert(rule: str, step: int, *, metric: str = "train/loss/total", **given: Any) -> Event:
    page = f"docs/rules/{rule}.md" if rule in BOOK else ""
    message = given.pop("message", f"Step {step}: {rule} of x.")
    values = {"value": 2.0, "threshold": 1.0, "page": page, "message": message, **given}
    return Alert(rule=rule, step=step, metric=metric, **values).to_event(float(step))


def finding(rule: str, since: int, *, earliest: int | None = None, **given: Any) -> Finding:
    values: dict[str, Any] = {
        "severity": "warning",
        "metric": "train/loss/total",
        "value": 2.0,
        "threshold": 1.0,
        "where": "",
        "message": "",
        "hint": "",
        "causes": (),
        "page": f"docs/rules/{rule}.md",
        "step": since,
        "count": 1,
        "last": since,
        "is_replayed": False,
    }
    begun = since if earliest is None else earliest
    return Finding(**{**values, "rule": rule, "since": since, "earliest": begun, **given})


# -- real trainings with one thing broken ----------------------------------------------------------


def test_a_rate_times_100_is_the_cause(trained: Trained) -> None:
    found = trained("rate_times_100", LORA)
    root = found.chains[0].root
    assert root.rule == "rate_out_of_range"
    assert root.threshold == 2e-2 < root.value
    assert [each.rule for each in found.chains[0].followers] == ["lora_outgrows_base"]
    assert found.curves["optim/lr/0"].values == pytest.approx(
        um.open_run(found.run).metrics("optim/lr/0")["optim/lr/0"].tolist()
    )


def test_a_layer_that_is_not_in_the_optimizer_is_named(trained: Trained) -> None:
    found = trained("layer_not_in_the_optimizer", ADAMW)
    (chain,) = found.chains
    assert chain.root.rule == "does_not_move"
    assert "layers.1." in chain.root.where
    assert "layers.0." not in chain.root.where
    assert found.verdict == "warning"


def test_a_nan_is_the_cause_of_the_skipped_steps(trained: Trained) -> None:
    found = trained("loss_not_finite", ADAMW)
    chain = found.chains[0]
    assert (chain.root.rule, chain.root.step) == ("nonfinite", ONSET)
    assert chain.because["skipped_steps"] == "nonfinite"
    assert math.isnan(found.curves["train/loss/total"].last)
    assert f"Step {ONSET}: the loss is nan." in found.headline


def test_adapters_without_a_gradient_are_the_cause_of_idle_adapters(trained: Trained) -> None:
    found = trained("adapters_behind_a_detach", LORA)
    chain = found.chains[0]
    assert chain.root.rule == "adapter_without_gradient"
    assert "lora_" in chain.root.where
    assert chain.root.earliest == 1 < chain.root.step  # it was zero from the start
    assert chain.because == {
        "no_gradient": "adapter_without_gradient",
        "lora_idle": "no_gradient",
    }


def test_a_healthy_training_is_told_to_be_fine(trained: Trained) -> None:
    found = trained("", ADAMW)
    assert (found.verdict, list(found.chains)) == ("fine", [])
    assert found.headline.startswith("Nothing looks broken: 75 steps were recorded, the loss went")
    assert {"nonfinite", "loss_spike", "does_not_move"} <= set(found.checks.quiet)
    reasons = found.checks.unchecked
    assert reasons["lora_idle"].endswith(
        "the model has no LoRA adapters, or they could not be read"
    )
    assert reasons["not_learning"] == "the run has 75 steps; the rule waits for 100"
    assert reasons["plateau"] == "train/loss/total has 75 values; the rule needs 200"
    assert reasons["overfitting"].endswith("the training does not evaluate")


# -- every state of a run --------------------------------------------------------------------------


def test_each_rule_is_fired_quiet_or_not_checked(tmp_path: Path) -> None:
    items = [*curve("train/loss/total", [3.0] * 40), alert("loss_spike", 36), alert("mine", 37)]
    checks = diagnose(write_run(tmp_path / "run", items)).checks
    assert checks.fired == ["loss_spike", "mine"]
    names = [*checks.fired, *checks.quiet, *checks.unchecked]
    assert len(names) == len(set(names))
    assert set(names) == {*BOOK, "mine"}
    assert "nonfinite" in checks.quiet


def test_a_run_without_steps_could_not_be_checked(tmp_path: Path) -> None:
    found = diagnose(write_run(tmp_path / "run", []))
    assert found.headline == "No steps were recorded, so nothing could be checked."
    assert found.verdict == "unknown"
    assert set(found.checks.unchecked.values()) == {"no steps were recorded"}


def test_rules_are_replayed_over_a_run_that_was_recorded_without(tmp_path: Path) -> None:
    losses = [3.0 + 0.01 * (i % 3) for i in range(50)] + [math.nan, 3.0]
    run = write_run(tmp_path / "run", curve("train/loss/total", losses))
    description = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(description | {"rules": []}))
    found = diagnose(run)
    root = found.chains[0].root
    assert (root.rule, root.step, root.is_replayed) == ("nonfinite", 51, True)
    assert any("without rules" in note for note in found.notes)


def test_a_rule_that_was_active_and_silent_is_believed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", curve("train/loss/total", [3.0, math.nan]))
    description = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(description | {"rules": ["nonfinite"]}))
    assert not diagnose(run).chains


def test_a_training_records_which_rules_are_active(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, rules=["nonfinite"])
    with monitor.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass
    assert um.open_run(tmp_path / "run").info["rules"] == ["nonfinite"]


def test_a_failure_without_alerts_is_the_headline(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(12), status="failed")
    with (tmp_path / "run/events.jsonl").open("a") as file:
        stop = {
            "kind": "stop",
            "step": 12,
            "time": 1.0,
            "status": "failed",
            "error": "OSError: full",
        }
        file.write(json.dumps(stop) + "\n")
    found = diagnose(run)
    assert found.headline.startswith("The run failed after step 12: OSError: full.")
    assert found.verdict == "critical"
    assert found.moments[-1].text == "failed after step 12: OSError: full"


def test_a_run_that_was_cut_off_says_so(tmp_path: Path) -> None:
    found = diagnose(write_run(tmp_path / "run", training(12), status=None))
    assert found.status == "crashed"
    assert any("killed or crashed" in note for note in found.notes)
    assert "killed or crashed" in found.moments[-1].text


def test_a_running_run_says_that_this_is_not_the_end(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    with monitor.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        found = diagnose(um.open_run(tmp_path / "run"))
    assert found.status == "running"
    assert "still training" in found.notes[0]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*training(40), alert("loss_spike", 36)])
    events = tmp_path / "run/events.jsonl"
    events.write_text("not JSON\n" + events.read_text())
    found = diagnose(run)
    assert any(note.startswith("events.jsonl is damaged") for note in found.notes)
    assert [moment.kind for moment in found.moments].count("damage") == 1
    assert found.chains[0].root.rule == "loss_spike"


def test_events_with_odd_entries_are_read(tmp_path: Path) -> None:
    odd = {"rule": 7, "step": 3, "severity": 1, "causes": "x", "value": None, "kind": "alert"}
    run = write_run(tmp_path / "run", training(12))
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write(json.dumps(odd | {"time": 1.0}) + "\n")
        file.write(json.dumps({"kind": "alert", "step": 4, "time": 1.0}) + "\n")
    found = diagnose(run)
    assert found.chains[0].root.rule == "7"
    json.dumps(summarize_diagnosis(found), allow_nan=False)


def test_what_happened_is_told_in_order(tmp_path: Path) -> None:
    items = [
        Event(kind="start", step=0, time=0.0, data={"max_steps": 50, "engine": "ddp"}),
        *training(40),
        *curve("eval/loss/total", [5.0, 4.0, 6.0]),
        alert("loss_spike", 36),
        Event(
            kind="action",
            step=37,
            time=1.0,
            data={"policy": "zclip", "action": "clip", "mode": "shadow", "reason": "large"},
        ),
        Event(kind="control", step=38, time=1.0, data={"command": "save"}),
        Event(kind="stop", step=40, time=2.0, data={"status": "stopped", "reason": "a person"}),
    ]
    found = diagnose(write_run(tmp_path / "run", items, status="stopped"))
    told = [(moment.step, moment.kind) for moment in found.moments]
    assert told == [
        *((0, "start"), (1, "eval"), (2, "eval"), (3, "eval"), (36, "alert"), (37, "action")),
        *((38, "control"), (40, "stop")),
    ]
    texts = {moment.kind: moment.text for moment in found.moments}
    assert "nothing was changed" in texts["action"]
    assert texts["stop"] == "stopped after step 40: a person"
    assert found.moments[2].text == "held-out loss 4.000, the best of 3"


# -- causes ----------------------------------------------------------------------------------------


def test_the_table_of_causes_names_rules_of_the_book() -> None:
    named = {*LEADS_TO, *(rule for rules in LEADS_TO.values() for rule in rules)}
    assert named <= set(BOOK)


def test_a_chain_goes_from_the_rate_to_the_nan() -> None:
    found = [
        finding("nonfinite", 70, severity="critical"),
        finding("divergence", 60, severity="critical"),
        finding("loss_spike", 40),
        finding("rate_out_of_range", 6, earliest=1),
    ]
    (chain,) = find_chains(found)
    assert chain.root.rule == "rate_out_of_range"
    assert chain.because == {
        "loss_spike": "rate_out_of_range",
        "divergence": "loss_spike",
        "nonfinite": "divergence",
    }


def test_what_began_later_is_no_cause() -> None:
    chains = find_chains([finding("rate_jump", 50), finding("loss_spike", 40)])
    assert [chain.root.rule for chain in chains] == ["rate_jump", "loss_spike"]
    assert not any(chain.followers for chain in chains)


def test_a_condition_that_takes_long_to_notice_is_a_cause_of_what_came_before() -> None:
    (chain,) = find_chains([finding("no_gradient", 79, earliest=60), finding("layer_shift", 61)])
    assert chain.root.rule == "no_gradient"


@pytest.mark.parametrize(("loss", "norm"), [(60, 60), (60, 62), (65, 62)])
def test_of_two_that_may_cause_each_other_the_first_one_does(loss: int, norm: int) -> None:
    (chain,) = find_chains([finding("loss_spike", loss), finding("gradient_spike", norm)])
    assert chain.root.since == min(loss, norm)


def test_the_worst_comes_first_and_causes_before_symptoms() -> None:
    found = [
        finding("throughput_drop", 5),
        finding("does_not_move", 20),
        finding("memory_creep", 70),
        finding("replica_drift", 80, severity="critical"),
        finding("plateau", 2, severity="info"),
    ]
    assert [chain.root.rule for chain in find_chains(found)] == [
        *("replica_drift", "does_not_move", "throughput_drop", "memory_creep", "plateau")
    ]


def test_a_renamed_rule_has_the_causes_of_its_page() -> None:
    renamed = finding("my_rate", 1, page="docs/rules/rate_out_of_range.md")
    (chain,) = find_chains([finding("divergence", 60), renamed])
    assert chain.root.rule == "my_rate"


def test_reasons_are_grouped() -> None:
    unchecked = {
        "a": "x/y/total is not recorded: the training does not evaluate",
        "b": "x/z/total is not recorded: the training does not evaluate",
        "c": "the run has 5 steps; the rule waits for 33",
    }
    assert group_reasons(unchecked) == {
        "the training does not evaluate": ["a", "b"],
        "the run has 5 steps": ["c (waits for 33)"],
    }


# -- JSON ------------------------------------------------------------------------------------------


def test_the_worst_run_fits_in_2000_tokens(tmp_path: Path) -> None:
    places = ", ".join(f"model.layers.{i}.self_attn.q_proj.lora_A.default.weight" for i in range(9))
    events = [
        alert(
            name,
            40 + i,
            message=f"Step {40 + i}: {name} " + "of \x1b[0m\N{SNOWMAN} very many words " * 30,
            where=places,
            causes=("a cause that is told in many words " * 5,) * 4,
            hint="a hint that is told in many words " * 5,
            severity="critical",
        )
        for i, name in enumerate([*BOOK, *(f"mine_{i}" for i in range(40))])
    ]
    more = [Event(kind="control", step=i, time=1.0, data={"say": "x" * 99}) for i in range(200)]
    run = write_run(tmp_path / "run", [*training(200), *events, *more], status="failed")
    made = summarize_diagnosis(diagnose(run))
    assert len(json.dumps(made, allow_nan=False)) <= LIMIT == 8000
    cut: Mapping[str, int] = made["cut"]
    assert cut["timeline"] > 100
    assert cut["causes"] > 0
    assert made["causes"][0]["rule"]


def test_a_small_diagnosis_is_told_in_full(tmp_path: Path) -> None:
    items = [*training(40), alert("loss_spike", 36, where="layer/3")]
    made = summarize_diagnosis(diagnose(write_run(tmp_path / "run", items)))
    assert made["cut"] == {}
    cause = made["causes"][0]
    assert (cause["rule"], cause["noticed"], cause["where"]) == ("loss_spike", 36, "layer/3")
    assert cause["page"] == "docs/rules/loss_spike.md"
    assert cause["first_before_last"] == [9.0, -25.0, -30.0]

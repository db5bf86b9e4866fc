"""The benchmark of training faults: what is declared exists, and a few trainings are judged."""

from __future__ import annotations

import pytest

from benchmarks.faults.cases import Case, every_case, faulty, healthy
from benchmarks.faults.hf import NOT_MONITORED
from benchmarks.faults.judging import JUDGES, Verdict, judge
from benchmarks.faults.of_ranks import RANK_FAULTS
from benchmarks.faults.registry import FAULTS
from benchmarks.faults.report import report, share
from benchmarks.faults.reported import REPORTED
from benchmarks.faults.rl import RL_FAULTS
from benchmarks.faults.short import SHORT, complaints, short_cases
from benchmarks.faults.training import Recorded
from ulysses_monitor.records import Alert, Severity
from ulysses_monitor.rules import BOOK


def test_each_fault_names_rules_that_exist() -> None:
    for fault in (*FAULTS.values(), *RL_FAULTS.values()):
        assert fault.names, fault.name
    for declared in (FAULTS, RL_FAULTS, RANK_FAULTS, REPORTED):
        for fault in declared.values():
            assert set(fault.names) <= {*BOOK, NOT_MONITORED}, fault.name
    assert len({*FAULTS, *RL_FAULTS}) >= 48


def test_each_fault_is_trained_in_both_sizes_and_there_are_as_many_healthy_runs() -> None:
    for half in (0, 1):
        assert {case.fault for case in faulty(half)} == {*FAULTS, *RL_FAULTS}
        assert len(list(healthy(half))) >= 24
    every = list(every_case(0))
    assert {c.fault for c in every} - {""} == {*FAULTS, *RL_FAULTS, *RANK_FAULTS, *REPORTED}
    assert sum(not c.fault for c in every if c.group != "faults") >= 24


def test_each_reported_bug_links_the_thread_that_reports_it() -> None:
    assert len(REPORTED) >= 18
    for bug in REPORTED.values():
        for link in bug.links:
            owner, kind = link.split("/")[3], link.split("/")[5]
            assert link.startswith(f"https://github.com/{owner}/")
            assert kind in ("issues", "pull")
            assert link.split("/")[6].isdigit()
        assert bug.what


@pytest.mark.full
def test_another_seed_is_another_training() -> None:
    first, second = (next(faulty(0, seed)).run() for seed in (0, 1))
    assert _losses(first) != _losses(second)
    assert _losses(first) == _losses(next(faulty(0, 0)).run())


def _losses(recorded: Recorded) -> list[float]:
    name = "train/loss/total"
    return [record[name] for record in recorded.records if name in record][:10]


def _case(fault: str) -> Case:
    return next(case for case in every_case(0) if case.fault == fault)


@pytest.mark.parametrize(
    ("fault", "steps"),
    [
        ("layer_reinitialised", 10),
        pytest.param("reward_fails_silently", 10, marks=pytest.mark.full),
        ("adapter_of_the_head_not_called", 1),
        ("state_lost_at_resume", 1),
        pytest.param("end_masked_as_padding", 1, marks=pytest.mark.full),
        pytest.param("rows_cut_at_a_third", 30, marks=pytest.mark.full),
        pytest.param("marks_between_all_tokens", 5, marks=pytest.mark.full),
    ],
)
def test_a_fault_is_caught_by_a_rule_that_names_its_cause(fault: str, steps: int) -> None:
    case = _case(fault)
    verdict = judge(case, case.run(), "default")
    assert verdict.right
    assert verdict.delay <= steps
    assert f"{verdict.right[0].rule}, {verdict.delay}" in report({"ours": [verdict]})


def test_a_training_that_the_monitor_refuses_is_caught_before_its_first_step() -> None:
    case = _case("adapter_frozen_by_preparation")
    verdict = judge(case, case.run(), "default")
    assert "no trainable parameters" in verdict.right[0].message
    assert verdict.delay == 0


def test_a_healthy_training_raises_nothing() -> None:
    case = next(healthy(1))
    assert judge(case, case.run(), "default").alerts == []


def _alert(rule: str, step: int, severity: Severity = "warning") -> Alert:
    return Alert(
        rule=rule, step=step, metric="", value=1.0, threshold=0.0, message="", severity=severity
    )


def _verdict(case: Case, *alerts: Alert) -> Verdict:
    return Verdict(case.without_training(), list(alerts))


def test_seeds_that_miss_are_counted_and_shares_have_wilsons_interval() -> None:
    cases = [next(c for c in faulty(0, seed) if c.fault == "rate_leaps") for seed in range(3)]
    caught = [_verdict(c, _alert("rate_jump", 62)) for c in cases[:2]]
    table = report({"ours": [*caught, _verdict(cases[2])]})
    assert "rate_jump, 2, **missed with 1 of 3 seeds**" in table
    assert "2 of 3 (21% to 94%)" in table
    assert share(0, 10) == "0 of 10 (0% to 28%)"


def test_the_short_form_complains_of_a_missed_fault_and_of_a_critical_healthy_run() -> None:
    cases = short_cases()
    assert {case.fault for case in cases} - {""} == set(SHORT)
    assert sum(not case.fault for case in cases) >= 8
    quiet = _verdict(next(c for c in cases if not c.fault), _alert("a", 1))
    assert complaints([quiet]) == []
    loud = _verdict(quiet.case, _alert("a", 1, "critical"))
    missed = _verdict(next(c for c in cases if c.fault))
    assert len(complaints([loud, missed])) == 2


@pytest.mark.full
def test_the_short_form_holds() -> None:
    ours = next(iter(JUDGES.values()))
    found = [judge(case, case.run(), ours) for case in short_cases()]
    assert complaints(found) == []

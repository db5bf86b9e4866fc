"""The benchmark of training faults: what is declared exists, and a few trainings are judged."""

from __future__ import annotations

import pytest

from benchmarks.faults.cases import Case, faulty, healthy
from benchmarks.faults.judging import judge, report
from benchmarks.faults.registry import FAULTS
from benchmarks.faults.rl import RL_FAULTS
from ulysses_monitor.rules import BOOK


def test_each_fault_names_rules_that_exist() -> None:
    for fault in (*FAULTS.values(), *RL_FAULTS.values()):
        assert fault.names, fault.name
        assert set(fault.names) <= set(BOOK), fault.name
    assert len({*FAULTS, *RL_FAULTS}) >= 48


def test_each_fault_is_trained_in_both_sizes_and_there_are_as_many_healthy_runs() -> None:
    for half in (0, 1):
        assert {case.fault for case in faulty(half)} == {*FAULTS, *RL_FAULTS}
        assert len(list(healthy(half))) >= 24


def _case(fault: str) -> Case:
    return next(case for case in faulty(0) if case.fault == fault)


@pytest.mark.parametrize("fault", ["layer_reinitialised", "reward_fails_silently"])
def test_a_fault_is_caught_by_a_rule_that_names_its_cause(fault: str) -> None:
    case = _case(fault)
    verdict = judge(case, case.run(), "default")
    assert verdict.right
    assert verdict.delay <= 10
    assert f"| {fault} | {case.kind} | first | {verdict.right[0].rule}" in report(
        {"ours": [verdict]}
    )


def test_a_healthy_training_raises_nothing() -> None:
    case = next(healthy(1))
    assert judge(case, case.run(), "default").alerts == []

"""The guard around parts that run inside the user's training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest

from ulysses_monitor.common.errors import TrainingStoppedError
from ulysses_monitor.common.guard import MAX_FAILURES, Guard


def fail(error: BaseException) -> Any:
    raise error


def test_a_part_that_works_gives_its_result() -> None:
    assert Guard().call("part", lambda: 3, 0) == 3


def test_a_part_that_keeps_failing_is_reported_twice_and_then_not_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports: list[Mapping[str, Any]] = []
    guard, calls = Guard(reports.append), []

    def breaks() -> int:
        calls.append(1)
        raise ValueError("out of\nrange")

    with caplog.at_level(logging.ERROR):
        results = [guard.call("rule mine", breaks, 7) for _ in range(5)]
    assert (results, len(calls)) == ([7] * 5, MAX_FAILURES)
    assert reports == [
        {"part": "rule mine", "state": "failed", "error": "ValueError: out of range"},
        {"part": "rule mine", "state": "off", "error": "ValueError: out of range"},
    ]
    assert caplog.text.count("rule mine failed; training continues") == 1
    assert caplog.text.count("rule mine is switched off") == 1
    assert caplog.text.count("Traceback") == 1


def test_parts_fail_apart_from_one_another() -> None:
    guard = Guard()
    for _ in range(MAX_FAILURES):
        guard.call("one", lambda: fail(ValueError()), None)
    assert guard.is_off("one")
    assert guard.call("other", lambda: 1, 0) == 1


def test_a_part_cannot_exit_the_process() -> None:
    assert Guard().call("part", lambda: fail(SystemExit(3)), "default") == "default"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TrainingStoppedError("enough")])
def test_an_interrupt_and_a_requested_stop_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        Guard().call("part", lambda: fail(error), None)


def test_a_part_that_others_wait_for_is_never_switched_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports: list[Mapping[str, Any]] = []
    guard, calls = Guard(reports.append), []

    def breaks() -> None:
        calls.append(1)
        raise ValueError("no")

    for _ in range(2 * MAX_FAILURES):
        guard.call("reading", breaks, None, stays_on=True)
    assert len(calls) == 2 * MAX_FAILURES
    assert [report["state"] for report in reports] == ["failed"]
    assert "switched off" not in caplog.text


def test_a_last_failure_switches_off_at_once() -> None:
    reports: list[Mapping[str, Any]] = []
    guard = Guard(reports.append)
    guard.note_failure("steering", ValueError("no"), is_last=True)
    assert guard.is_off("steering")
    assert [report["state"] for report in reports] == ["failed", "off"]

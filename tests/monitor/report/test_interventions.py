"""The report and the console show what policies did."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from tests.support.recorded import training, write_run
from ulysses_monitor.records import Event
from ulysses_monitor.report import summarize_actions, write_report
from ulysses_monitor.sinks.console import ConsoleSink


def action(step: int, policy: str, reason: str = "", mode: str = "active") -> Event:
    data = {"policy": policy, "action": "skip", "mode": mode, "reason": reason}
    return Event(kind="action", step=step, time=float(step), data=data)


EVENTS = [
    action(2, "one", "first"),
    action(3, "one", "<b>last</b>"),
    action(3, "two", mode="shadow"),
    action(7, "one", "<b>last</b>"),
]


def test_actions_are_summarized_by_policy_action_and_mode(tmp_path: Path) -> None:
    one, two = summarize_actions(write_run(tmp_path / "run", [*training(8), *EVENTS]))
    assert (one["policy"], one["mode"], one["steps"]) == ("one", "active", 3)
    assert (one["first"], one["last"], one["reason"]) == (2, 7, "<b>last</b>")
    assert (two["policy"], two["mode"], two["steps"]) == ("two", "shadow", 1)


def test_the_report_shows_actions_as_interventions_and_not_as_events(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", [*training(8), *EVENTS])).read_text()
    assert "Interventions" in text
    assert "&lt;b&gt;last&lt;/b&gt;" in text
    assert text.count("<code>skip</code>") == 2
    none = write_report(write_run(tmp_path / "none", training(8))).read_text()
    assert "Interventions" not in none


def test_the_console_shows_the_first_of_consecutive_actions_and_every_command() -> None:
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=200))
    sink.write(Event(kind="start", step=0, time=0.0, data={"engine": "plain"}))
    order = {"id": "x", "who": "ann", "why": "odd", "command": "policies to off"}
    for event in [*EVENTS, Event(kind="control", step=8, time=8.0, data=order)]:
        sink.write(event)
    lines = out.getvalue().splitlines()
    assert lines[1:] == [
        "step 2: policy one: skip, first",
        "step 3: policy two would: skip, ",
        "step 7: policy one: skip, <b>last</b>",
        "step 8: ann: policies to off (odd)",
    ]

"""The report's section on answers to fixed prompts."""

from __future__ import annotations

from pathlib import Path

from tests.monitor.report.recorded import make_run
from ulysses_monitor.records import Event
from ulysses_monitor.report import write_report
from ulysses_monitor.report.tables import list_answers


def answers_at(step: int, text: str) -> Event:
    data = {"prompts": ["1+<b>1</b>="], "answers": [text], "references": ["2"]}
    return Event(kind="answers", step=step, time=1e9 + step, data=data)


def test_a_prompt_has_its_first_and_last_answer_and_some_between(tmp_path: Path) -> None:
    events = [answers_at(step, f"at {step}") for step in range(0, 101, 10)]
    run = make_run(tmp_path / "r", [{"train/loss/total": 1.0}], events=events)
    [row] = list_answers(run, limit=3)
    assert (row["prompt"], row["reference"]) == ("1+<b>1</b>=", "2")
    assert [answer["step"] for answer in row["answers"]] == [0, 50, 100]
    assert row["answers"][-1]["text"] == "at 100"


def test_a_step_that_was_trained_twice_counts_once(tmp_path: Path) -> None:
    events = [answers_at(10, "before"), answers_at(10, "after")]
    run = make_run(tmp_path / "r", [{"train/loss/total": 1.0}], events=events)
    assert list_answers(run)[0]["answers"] == [{"step": 10, "text": "after"}]


def test_texts_are_escaped_and_not_repeated_among_the_events(tmp_path: Path) -> None:
    events = [answers_at(1, "<script>alert(1)</script>")]
    run = make_run(tmp_path / "r", [{"train/loss/total": 1.0}], events=events)
    page = write_report(run).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 1
    assert "1+&lt;b&gt;1&lt;/b&gt;=" in page


def test_a_run_without_answers_has_no_such_section(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "r", [{"train/loss/total": 1.0}]))
    assert 'id="answers"' not in page.read_text(encoding="utf-8")

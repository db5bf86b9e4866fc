"""`ulysses diagnose`: what happened in a run and why, as a person and a program read it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.recorded import curve, training, write_run
from ulysses_monitor.records import Alert

Ulysses = Callable[..., tuple[int, str, str]]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A run with a loss that leaps at step 45 and is NaN at step 50."""
    losses = [3.0 + 0.01 * (i % 3) for i in range(44)] + [9.0, 3.0, 3.0, 3.0, 3.0, math.nan]
    alerts = [
        Alert(
            rule="loss_spike",
            step=45,
            metric="train/loss/total",
            value=9.0,
            threshold=3.5,
            message="Step 45: [bold]a spike\x1b[0m <b>.",
            hint="Look at this step's batch.",
            causes=("a batch unlike the others",),
            page="docs/rules/loss_spike.md",
        ).to_event(45.0)
    ]
    write_run(tmp_path / "runs/one", [*curve("train/loss/total", losses), *alerts])
    return tmp_path / "runs/one"


def test_a_diagnosis_is_told_in_plain_words(ulysses: Ulysses, broken: Path) -> None:
    code, out, error = ulysses("diagnose", "runs/one")
    assert (code, error) == (0, "")
    assert "\x1b" not in out
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].startswith("runs/one: finished, step 50")
    assert "Probable cause" in lines
    assert "Step 45: [bold]a spike\N{REPLACEMENT CHARACTER}[0m <b>." in lines
    assert any(line.startswith("train/loss/total  ▁") and "█" in line for line in lines)
    assert "likely because  1. a batch unlike the others" in lines
    assert "what to try     Look at this step's batch." in lines
    assert "more            docs/rules/loss_spike.md" in lines
    place = lines.index("What probably followed from it")
    assert lines[place + 1].startswith("nonfinite  critical, at step 50, follows from loss_spike")
    assert any(line.startswith("2 rules fired") for line in lines)
    assert any(line.startswith("not checked (") and "lora_idle" in line for line in lines)


def test_a_run_without_alerts_says_that_nothing_looks_broken(
    ulysses: Ulysses, tmp_path: Path
) -> None:
    write_run(tmp_path / "runs/one", training(12))
    code, out, _ = ulysses("diagnose", "runs/one")
    assert code == 0
    assert "Nothing looks broken: 12 steps were recorded, the loss went 7.00 → 0" in out
    assert "Probable cause" not in out


def test_json_is_one_line_within_the_limit(ulysses: Ulysses, broken: Path) -> None:
    code, out, error = ulysses("diagnose", "runs/one", "--json")
    assert (code, error) == (0, "")
    assert len(out) <= 8000
    found = json.loads(out)
    assert found["causes"][0]["rule"] == "loss_spike"
    assert found["causes"][0]["followed_by"][0]["value"] == "nan"
    assert found["cut"] == {}


def test_a_page_and_a_picture_are_written(ulysses: Ulysses, broken: Path, tmp_path: Path) -> None:
    code, _, error = ulysses("diagnose", "runs/one", "--html", "d.html", "--plot", "d.png")
    assert (code, error) == (0, "")
    page = (tmp_path / "d.html").read_text()
    assert "<svg" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/two"], "runs/two"),
        (["runs/one", "--plot", "d.gif"], "diagnose: plot is d.gif; expected a file named *.png"),
        (["runs/one", "--plot", "no/d.png"], "diagnose: the folder no of no/d.png does not exist"),
        (["runs/one", "--html", "runs"], "diagnose: runs is a directory; expected a file such as"),
    ],
)
def test_wrong_input_is_one_line(
    ulysses: Ulysses, broken: Path, arguments: list[str], message: str
) -> None:
    code, _, error = ulysses("diagnose", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_replay_shows_which_rules_were_not_checked(ulysses: Ulysses, broken: Path) -> None:
    _, out, _ = ulysses("replay", "runs/one")
    assert "not checked (train/loss/total has 50 values): plateau (needs 200)" in out
    found = json.loads(ulysses("replay", "runs/one", "--json")[1])["rules"]
    assert found["not_checked"]["lora_idle"].endswith("or they could not be read")
    assert "lora_idle" not in found["summary"]
    assert "nonfinite" in found["summary"]

"""The examples in docs/sinks.md work unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import ulysses_monitor as um
from ulysses_monitor.sinks import check_sinks, make_sinks

pytestmark = pytest.mark.services

DOCUMENT = Path(__file__).parents[3] / "docs" / "sinks.md"


@pytest.fixture(autouse=True)
def _webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLACK_WEBHOOK", "https://hooks.example.org/x")


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(text)


def test_the_yaml_example_names_sinks_that_can_be_made() -> None:
    specs = yaml.safe_load(block("yaml"))["monitor"]["sinks"]
    check_sinks(specs)
    assert len(make_sinks(specs[:-1])) == 7  # the last one is the reader's own class


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {"um": um})  # noqa: S102 - the document's own code
    assert list(tmp_path.iterdir()) == []  # constructors open nothing

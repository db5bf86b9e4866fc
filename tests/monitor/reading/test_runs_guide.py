"""The examples in docs/runs.md run, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.recorded import training, write_run

GUIDE = Path(__file__).parents[3] / "docs/runs.md"


def test_the_examples_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo", "sft-1"):
        write_run(tmp_path / "runs" / name, training(300))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) == 5
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)  # noqa: S102 - our own guide

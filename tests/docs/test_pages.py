"""The Python of the docs pages runs, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("writing_a_*.md"))


def python_blocks(page: Path) -> list[str]:
    """Returns the Python blocks of a page, each at its own line, so that errors name the line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


def test_there_is_a_page_for_each_thing_of_ones_own() -> None:
    names = [page.stem.removeprefix("writing_a_") for page in PAGES]
    assert names == ["metric", "policy", "rule", "sink"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = python_blocks(page)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # noqa: S102 - our own pages

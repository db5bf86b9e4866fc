"""docs/frameworks.md shows only code that `make test-clients` runs."""

from __future__ import annotations

import re
import textwrap

import pytest

from tests.clients.environments import ROOT

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
PROGRAMS = {
    path.name: path.read_text() for path in (ROOT / "tests/clients/programs").glob("*_*.py")
}


def is_part_of(block: str, program: str) -> bool:
    """Whether the lines of `block` follow one another in `program`, at any indentation."""
    wanted = block.splitlines()
    lines = program.splitlines()
    parts = (lines[i : i + len(wanted)] for i in range(len(lines)))
    return any(textwrap.dedent("\n".join(part)) == "\n".join(wanted) for part in parts)


@pytest.mark.parametrize("block", [text for _, text in BLOCKS])
def test_each_block_of_code_is_part_of_a_program(block: str) -> None:
    assert [name for name, program in PROGRAMS.items() if is_part_of(block, program)]


def test_there_is_code_and_nothing_else_is_shown_as_code() -> None:
    assert {language for language, _ in BLOCKS} == {"python"}
    assert not is_part_of("this_is_nowhere()", PROGRAMS["loop_plain.py"])

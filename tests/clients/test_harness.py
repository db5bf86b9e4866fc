"""What the comparison of two trainings sees and what it overlooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.case import Case, Client, Outcome
from tests.clients.comparison import Ran, compare_weights, differing_lines
from tests.clients.page import TableRow, format_table, write_page

CASE = Case(Client("trainer", packages=()), "sft, LoRA", command=("train",))


def ran(folder: Path, stderr: str = "", weights: bytes = b"") -> Ran:
    folder.mkdir()
    if weights:
        (folder / "model.safetensors").write_bytes(weights)
    return Ran(folder, Outcome([], {}), 1.0, "", stderr)


def test_times_progress_and_our_own_lines_are_no_difference(tmp_path: Path) -> None:
    plain = f"[INFO 2026-01-02 03:04:05,678] in {tmp_path}/plain\n 50%|##  | 1.2it/s\rend"
    watched = (
        f"ulysses: attached\n[INFO 2026-01-02 03:04:06,789] in {tmp_path}/watched\n"
        "100%|####| 1.9it/s\rend\nulysses: recorded run"
    )
    runs = ran(tmp_path / "plain", plain), ran(tmp_path / "watched", watched)
    assert differing_lines(CASE, *runs) == []


def test_a_line_that_follows_a_progress_bar_is_compared(tmp_path: Path) -> None:
    plain, watched = "0/5 [00:00<?, ?it/s]same\n", "0/5 [00:00<?, ?it/s]monitor: x\nsame\n"
    assert differing_lines(CASE, ran(tmp_path / "a", plain), ran(tmp_path / "b", watched)) == []
    runs = ran(tmp_path / "c", plain), ran(tmp_path / "d", "0/5 [00:00<?, ?it/s]other\n")
    assert differing_lines(CASE, *runs) == ["stderr without: same", "stderr with: other"]


def test_any_other_line_is_a_difference(tmp_path: Path) -> None:
    runs = ran(tmp_path / "plain", "same\n"), ran(tmp_path / "watched", "same\nwarning: x\n")
    assert differing_lines(CASE, *runs) == ["stderr with: warning: x"]


@pytest.mark.parametrize(
    ("left", "right", "equal"), [(b"a", b"a", True), (b"a", b"b", False), (b"", b"", False)]
)
def test_weights_must_be_there_and_equal(
    tmp_path: Path, left: bytes, right: bytes, equal: bool
) -> None:
    runs = ran(tmp_path / "plain", "", left), ran(tmp_path / "watched", "", right)
    assert compare_weights(CASE, *runs) is equal


def test_the_page_keeps_the_rows_of_other_cases(tmp_path: Path) -> None:
    page = tmp_path / "clients.md"
    old = TableRow("b", "1", "sft, LoRA", "equal", "equal", "1.0e-07", "1.0", "2.0")
    new = TableRow("b", "2", "sft, LoRA", "equal", "equal", "2.0e-07", "1.0", "2.0")
    other = TableRow("a", "1", "dpo", "equal", "equal", "1.0e-07", "1.0", "2.0")
    write_page(page, [old, other])
    write_page(page, [new])
    assert page.read_text().endswith(f"\n\n{format_table([other, new])}")

"""The files ``rows/rank-<rank>.jsonl`` of a run: which rows each rank saw at its latest steps.

Every rank writes its own, one line a step. A file holds at most twice the steps that it keeps.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ulysses_monitor.common.files import replace_file
from ulysses_monitor.records.rows import Row
from ulysses_monitor.store.location import Location

__all__ = ["ROWS_FOLDER", "RowsFile", "read_steps"]

ROWS_FOLDER = "rows"
_NAME = re.compile(r"rank-(\d{1,9})\.jsonl", re.ASCII)
_SECONDS = 1.0
"""Longest time between two writes while steps come."""

Numbers = Sequence[float | None]
"""A row, in the order of `COLUMNS`; None for unknown."""


class RowsFile:
    """Writes the rows of one rank.

    Args:
        run_dir: the run directory; nothing is written where this machine does not have it.
        rank: this rank.
        keep: steps to keep.
    """

    def __init__(self, run_dir: Path, rank: int, keep: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._path = run_dir / ROWS_FOLDER / f"rank-{rank}.jsonl"
        self._lines: deque[bytes] = deque(maxlen=keep)
        self._unwritten = 0
        self._written = self._count_lines()
        self._time = time.monotonic()

    def add(self, step: int, rows: Iterable[Numbers]) -> None:
        """Takes the rows of a step, and writes if the last time is a second ago.

        Raises:
            OSError: the file cannot be written.
        """
        line = json.dumps([step, list(rows)], separators=(",", ":"))
        self._lines.append(line.encode() + b"\n")
        self._unwritten = min(self._unwritten + 1, self._keep)
        if time.monotonic() - self._time >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was taken.

        Raises:
            OSError: the file cannot be written; the next call tries again.
        """
        self._time = time.monotonic()
        if not self._unwritten or not self._run_dir.is_dir():
            return
        self._path.parent.mkdir(exist_ok=True)
        if self._written + self._unwritten > 2 * self._keep:
            with replace_file(self._path) as file:
                file.writelines(self._lines)
            self._written = len(self._lines)
        else:
            with self._path.open("ab") as file:
                file.write(b"".join([*self._lines][-self._unwritten :]))
            self._written += self._unwritten
        self._unwritten = 0

    def _count_lines(self) -> int:
        """Counts the lines of the training that this one resumes, and ends an incomplete one."""
        if not self._path.is_file():
            return 0
        held = self._path.read_bytes()
        if held and not held.endswith(b"\n"):  # the writer was killed
            with self._path.open("ab") as file:
                file.write(b"\n")
        return held.count(b"\n")


def read_steps(run: Location) -> dict[int, list[Row]]:
    """Returns the rows of all ranks by step; of a step that was trained twice, the later one's.

    Lines that a killed writer left incomplete are left out.
    """
    steps: dict[int, list[Row]] = {}
    folder = run / ROWS_FOLDER
    for name in folder.children():
        if (found := _NAME.fullmatch(name)) is None:
            continue
        latest = dict(_read_lines((folder / name).read(), int(found[1])))
        for step, rows in latest.items():
            steps.setdefault(step, []).extend(rows)
    return steps


def _read_lines(data: bytes, rank: int) -> Iterator[tuple[int, list[Row]]]:
    for line in data.splitlines():
        try:
            step, rows = json.loads(line)
            yield int(step), [Row.of(rank, numbers) for numbers in rows]
        except (ValueError, TypeError, RecursionError, OverflowError):
            continue

"""What is found in data, and how it is collected in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["EXAMPLES", "Finding", "Health", "Numbers", "Severity", "Spots"]

Severity = Literal["serious", "warning", "note"]

EXAMPLES = 5
"""Rows that a finding names."""


@dataclass
class Spots:
    """Counts rows, and keeps where the first of them are."""

    count: int = 0
    where: list[str] = field(default_factory=list)

    def add(self, where: str, detail: str = "") -> None:
        """Counts a row."""
        self.count += 1
        if self.has_room:
            self.where.append(f"{where}: {detail}" if detail else where)

    @property
    def has_room(self) -> bool:
        """Whether the next row will be named."""
        return len(self.where) < EXAMPLES


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        check: the name of the check.
        severity: ``serious`` spoils a training, ``warning`` may, ``note`` is worth knowing.
        message: what was found, with numbers.
        advice: what to try.
        count: how many rows, pairs or tokens; None if the finding is about all.
        examples: file and number of the first rows, at most `EXAMPLES`.
    """

    check: str
    severity: Severity
    message: str
    advice: str
    count: int | None = None
    examples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A split in numbers.

    Attributes:
        examples: rows of the files that could be read.
        unreadable: rows that could not.
        rows: rows to train on, before packing.
        tokens: their tokens.
        trained: tokens that have a label.
        truncated: examples cut at ``cutoff_len``.
        cut_answers: those of which an answer is cut.
        lengths: tokens of a row: ``min``, ``median``, ``p95``, ``max``.
        histogram: rows by length: the upper end of a bin, and its number of rows.
        sides: for preference pairs, the mean length of the ``chosen`` and ``rejected`` answer.
    """

    examples: int
    unreadable: int
    rows: int
    tokens: int
    trained: int
    truncated: int
    cut_answers: int
    lengths: Mapping[str, int]
    histogram: Sequence[tuple[int, int]]
    sides: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Health:
    """The health of a data set.

    Attributes:
        stage: the stage of training.
        splits: ``train`` and ``eval`` in numbers.
        findings: the serious ones first.
        clean: checks that found nothing.
        skipped: checks that do not apply, and why.
    """

    stage: str
    splits: Mapping[str, Numbers]
    findings: Sequence[Finding]
    clean: Sequence[str]
    skipped: Mapping[str, str]

    @property
    def is_serious(self) -> bool:
        """Whether something would spoil a training."""
        return any(finding.severity == "serious" for finding in self.findings)

"""Cells of the tables that benchmarks print."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

__all__ = ["spread", "table"]


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Returns ``median [least, most]``, each written as `form`."""
    found = list(values)
    return f"{statistics.median(found):{form}} [{min(found):{form}}, {max(found):{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown: titles in the first column, numbers in the others."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

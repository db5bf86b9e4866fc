"""Cells of the tables that benchmarks print."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

__all__ = ["spread"]


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Returns ``median [least, most]``, each written as `form`."""
    found = list(values)
    return f"{statistics.median(found):{form}} [{min(found):{form}}, {max(found):{form}}]"

"""Draws numbers in one line of a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = ["sparkline"]

_SPARKS = "▁▂▃▄▅▆▇█"
_HOLE = "!"
"""A value here is NaN or Inf."""


def sparkline(values: Sequence[float], room: int) -> str:
    """Draws `values` in at most `room` characters; each shows a mean, or that one is not finite.

    Returns nothing if there is too little room, or too little to draw.

    >>> sparkline([1.0, 2.0, 3.0, math.nan], 4)
    '▁▄█!'
    """
    known = [v for v in values if math.isfinite(v)]
    if room < 4 or len(known) < 2:
        return ""
    room = min(room, len(values))
    edges = [len(values) * i // room for i in range(room + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)] or [1.0]
    # A logarithm, so that a spike does not flatten the rest.
    scale = math.log if min(finite) > 0 and max(finite) > 10 * min(finite) else float
    low, high = scale(min(finite)), scale(max(finite))
    step = (high - low) / (len(_SPARKS) - 1) or 1.0
    return "".join(
        _SPARKS[round((scale(mean) - low) / step)] if math.isfinite(mean) else _HOLE
        for mean in means
    )

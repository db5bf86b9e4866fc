"""Gradient norms leave out elements that are NaN or Inf: alone they would look calm."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["COUNT", "pair_norms"]

COUNT = "grad/nonfinite/total"
"""The number of gradient elements that are NaN or Inf."""

_NORM, _COUNTS = "grad/norm/", "grad/nonfinite/"


def pair_norms(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Returns the positions of gradient norms, and those of the counts for the same scopes.

    If such a count is above 0, the norm of that scope is NaN or Inf, whatever was recorded.

    >>> pair_norms(["grad/norm/total", "train/loss/total", "grad/nonfinite/total"])
    ([0], [2])
    """
    place = {name: i for i, name in enumerate(names)}
    pairs = [
        (i, place[count])
        for i, name in enumerate(names)
        if name.startswith(_NORM) and (count := _COUNTS + name.removeprefix(_NORM)) in place
    ]
    return [norm for norm, _ in pairs], [count for _, count in pairs]

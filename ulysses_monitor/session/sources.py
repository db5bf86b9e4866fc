"""Metrics that somebody else measures, read at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo
from ulysses_monitor.records import Metric

__all__ = ["ReadSource", "Sources"]

ReadSource = Callable[[], Sequence[float]]


class Sources:
    """Further metrics of every step, summed over ranks in the step's one vector.

    Args:
        guard: calls the sources.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._sources: list[tuple[tuple[str, ...], ReadSource]] = []

    def add(self, names: Sequence[str], read: ReadSource) -> Undo:
        """Adds metrics of every step.

        Args:
            names: names of the metrics, ``family/stat/scope``, the same on all ranks.
            read: called once a step before clipping; returns this rank's values in that order. If
                it raises, the metrics of the step are NaN.

        Returns:
            A function that removes them; call it on all ranks between the same two steps.

        Raises:
            InputError: a name has another form.
        """
        source = tuple(Metric(name=name).name for name in names), read
        self._sources.append(source)

        def remove() -> None:
            if source in self._sources:
                self._sources.remove(source)

        return remove

    def read(self) -> dict[str, float]:
        """Returns this rank's values; NaN for a source that fails, so that all ranks send alike."""
        values: dict[str, float] = {}
        for names, read in self._sources:
            values |= dict.fromkeys(names, math.nan)
            part = f"source {', '.join(names)}"
            values |= self._guard.call(part, partial(_read, names, read), {})
        return values


def _read(names: Sequence[str], read: ReadSource) -> dict[str, float]:
    return dict(zip(names, map(float, read()), strict=True))

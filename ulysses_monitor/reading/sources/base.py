"""What a `RunReader` reads from, whatever wrote the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ulysses_monitor.store import Block, Location

__all__ = ["Points", "Source", "lay_out"]


class Source(Protocol):
    """A recorded run. Each call reads what is there at that moment."""

    @property
    def folder(self) -> Location:
        """The folder that holds the run."""

    @property
    def damaged(self) -> Mapping[str, str]:
        """Files that the last read skipped or cut short, and why."""

    def info(self) -> dict[str, Any]:
        """The run's description; `name` and `status` at least.

        Raises:
            InputError: it cannot be read.
        """

    def names(self) -> tuple[str, ...]:
        """Names of all metrics."""

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """The metrics whose name is `wanted`, a row for each step that has one of them."""

    def events(self) -> list[dict[str, Any]]:
        """Events, each with `kind`, `step` and `time`, in the order they were written."""


@dataclass
class Points:
    """One metric's values as they were written; a step may come twice, and the later one counts."""

    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, time: float, value: float) -> None:
        """Appends one value."""
        self.steps.append(step)
        self.times.append(time)
        self.values.append(value)


def lay_out(metrics: Mapping[str, Points]) -> Block:
    """Metrics that were written one by one as one block, a row for each step."""
    written = [np.array(points.steps, np.int64) for points in metrics.values()]
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *written]))
    times = np.full(len(steps), np.nan)
    values = np.full((len(steps), len(metrics)), np.nan, np.float32)
    present = np.zeros(values.shape, bool)
    for i, (points, at) in enumerate(zip(metrics.values(), written, strict=True)):
        rows = np.searchsorted(steps, at)
        times[rows] = points.times
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            values[rows, i] = np.array(points.values, np.float64)
        present[rows, i] = True
    return Block(tuple(metrics), steps, times, values, present)

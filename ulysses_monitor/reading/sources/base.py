"""The interface that a `RunReader` reads through, and what its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.sources.description import load_json
from ulysses_monitor.store import Block, Location

__all__ = ["MetricLog", "Source", "build_block", "read_json"]


class Source(Protocol):
    """A recorded run. Every call reads the run as it is at that moment."""

    @property
    def folder(self) -> Location:
        """The folder that holds the run."""

    @property
    def damaged(self) -> Mapping[str, str]:
        """Files that the last read skipped, in whole or in part, and why."""

    def info(self) -> dict[str, Any]:
        """Returns the run's description, with `name` and `status` at least.

        Raises:
            InputError: it cannot be read.
        """

    def names(self) -> tuple[str, ...]:
        """Returns the names of all metrics."""

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """Returns the metrics whose name is `wanted`, with a row for each step that has one."""

    def events(self) -> list[dict[str, Any]]:
        """Returns the events in the order they were written, with `kind`, `step` and `time`."""


@dataclass
class MetricLog:
    """The values of one metric in the order they were written.

    If a step occurs twice, its later value counts.
    """

    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, time: float, value: float) -> None:
        """Appends one value."""
        self.steps.append(step)
        self.times.append(time)
        self.values.append(value)


def build_block(metrics: Mapping[str, MetricLog]) -> Block:
    """Combines metrics that were written one by one into a block with a row for each step."""
    logged = [np.array(log.steps, np.int64) for log in metrics.values()]
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *logged]))
    times = np.full(len(steps), np.nan)
    values = np.full((len(steps), len(metrics)), np.nan, np.float32)
    present = np.zeros(values.shape, bool)
    for i, (log, log_steps) in enumerate(zip(metrics.values(), logged, strict=True)):
        rows = np.searchsorted(steps, log_steps)
        times[rows] = log.times
        with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite
            values[rows, i] = np.array(log.values, np.float64)
        present[rows, i] = True
    return Block(tuple(metrics), steps, times, values, present)


def read_json(file: Location) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        content = load_json(file.read())
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"run {file}: cannot be read: {reason}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"run {file}: cannot be read: holds a {kind}; expected a JSON object")
    return content

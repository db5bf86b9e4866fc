"""The course of the metrics that a finding is about: numbers, and something to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ulysses_monitor.diagnosis.findings import Finding
from ulysses_monitor.reading import RunReader, hide_partial_norms
from ulysses_monitor.records.nonfinite import COUNT

__all__ = ["Curve", "find_metric", "read_curves"]

_USUAL = ("train/loss/total", "grad/norm/total")
"""Metrics whose course is always of interest."""


@dataclass(frozen=True)
class Curve:
    """The course of a metric.

    Attributes:
        metric: its name.
        steps: the steps that have it, ascending.
        values: its values; NaN and Inf are what was measured.
    """

    metric: str
    steps: Sequence[int]
    values: Sequence[float]

    @property
    def first(self) -> float:
        """The first value."""
        return self.values[0]

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]

    def before(self, step: int) -> float:
        """Returns the value before a step; NaN if there is none."""
        place = int(np.searchsorted(self.steps, step))
        return self.values[place - 1] if place else math.nan

    def around(self, step: int, room: int = 60) -> Curve:
        """Returns the `room` values around a step: two thirds of them before it."""
        place = int(np.searchsorted(self.steps, step))
        begin = max(0, min(place - 2 * room // 3, len(self.steps) - room))
        part = slice(begin, begin + room)
        return Curve(self.metric, self.steps[part], self.values[part])


def read_curves(run: RunReader, findings: Iterable[Finding]) -> Mapping[str, Curve]:
    """Returns the courses of loss, gradient norm and what findings are about, by metric."""
    names = frozenset(run.names())
    wanted = dict.fromkeys([*_USUAL, *(find_metric(each, names) for each in findings)])
    chosen = [name for name in wanted if name in names]
    counts = [COUNT] if COUNT in names else []
    block = hide_partial_norms(run.block(*chosen, *counts, missing="ignore")) if chosen else None
    curves: dict[str, Curve] = {}
    for name in chosen if block is not None else ():
        assert block is not None  # noqa: S101 - something was chosen
        place = block.names.index(name)
        rows = block.present[:, place]
        values = np.asarray(block.values[rows, place], np.float64)
        if len(values):
            curves[name] = Curve(name, block.steps[rows].tolist(), values.tolist())
    return curves


def find_metric(finding: Finding, names: Iterable[str]) -> str:
    """Returns a metric that shows what was found; empty if the run has none.

    A finding about a pattern is shown by the first of its places, or by the total.
    """
    known = names if isinstance(names, frozenset) else frozenset(names)
    metric = finding.metric
    if "*" not in metric:
        return metric if metric in known else ""
    prefix = metric.partition("*")[0]
    head, place = prefix.rsplit("/", 2)[0], finding.where.partition(",")[0].partition(" and ")[0]
    family = "/".join(prefix.split("/")[:2])
    candidates = (f"{prefix}{place}", f"{family}/{place}", f"{family}/total", f"{head}/total")
    return next((name for name in candidates if name in known), "")

"""Outliers among recent values, and the policy that skips them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field

from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.settings import MetricName, list_as_tuple
from ulysses_monitor.policies.base import LOSS, NORM
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.records import Action, StepRecord

__all__ = ["SkipOutliers", "WindowLength", "outlier_limit", "remember", "window_problem"]

WindowLength = Annotated[int, Field(ge=2, le=100_000)]
"""A number of steps that is enough for a standard deviation."""

MetricNames = Annotated[
    tuple[MetricName, ...],
    BeforeValidator(list_as_tuple),
    Field(min_length=1),
    Expected("a list of names of metrics, such as ['grad/norm/total']"),
]


def outlier_limit(past: list[float], warmup: int, sigmas: float) -> float | None:
    """Returns mean + `sigmas` standard deviations; None for fewer than `warmup` values."""
    if len(past) < warmup:
        return None
    values = np.asarray(past)
    return float(values.mean() + sigmas * values.std(ddof=1))


def remember(past: list[float], value: float, window: int) -> None:
    """Adds a value, if it is finite, and drops the oldest beyond `window` values."""
    if math.isfinite(value):
        past.append(value)
        del past[:-window]


def window_problem(warmup: int, window: int) -> str | None:
    """Says why a policy can never act, if it waits for more values than it keeps."""
    if warmup <= window:
        return None
    return f"warmup is {warmup}; expected at most window, which is {window}, or it can never act"


@dataclass(kw_only=True)
class SkipOutliers(BoundedPolicy):
    """Skips a step whose loss or gradient norm is far above those before it.

    Source: OLMo-core's SkipStep optimizers: above mean + 6 standard deviations of the last 128
    steps, once there are 64. OLMo-core includes the step in question in both; here they are those
    before it. All values enter the window, also those of skipped steps, so that a new level that
    stays becomes the usual one; `longest` limits the consecutive skips. Unknown and non-finite
    values do not enter.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"skip"})

    sigmas: Annotated[float, Field(gt=0, le=1_000_000)] = 6.0
    """Standard deviations above the mean at which a value is an outlier."""
    window: WindowLength = 128
    """Number of earlier steps that the newest is compared with."""
    warmup: WindowLength = 64
    """Steps that must have passed before any is an outlier."""
    metrics: MetricNames = (LOSS, NORM)
    """Metrics; an outlier of any of them skips the step."""
    longest: Annotated[int, Field(ge=1)] = 10
    """See `BoundedPolicy`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := window_problem(self.warmup, self.window):
            raise self._refusal(problem)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return self.metrics

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return super().steps_before_acting + self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, seen = history[-1], self.memory.setdefault("seen", {})
        outliers = []
        for metric in self.metrics:
            value, past = record.get(metric), seen.setdefault(metric, [])
            limit = outlier_limit(past, self.warmup, self.sigmas)
            if limit is not None and value > limit:
                outliers.append((metric, value, limit))
            remember(past, value, self.window)
        if self.should_act(bool(outliers), bool(outliers)):
            metric, value, limit = outliers[0]
            yield Action(
                kind="skip",
                reason=f"{metric} is {value:.4g}, above {limit:.4g}",
                read={metric: value for metric, value, _ in outliers},
            )

"""Plain data that every other part speaks: metrics, schemas, records, alerts, events.

A `StepRecord` is one object however many metrics it carries: a `Schema` that is built once and one
array of values in the schema's order. Names follow ``family/stat/scope``, for example
``grad/norm/layer/3`` or ``optim/exp_avg_norm/param/model.embed_tokens.weight``.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ulysses_monitor.errors import InputError, nearest

__all__ = [
    "METRIC_SCHEMA_VERSION",
    "Action",
    "Alert",
    "Event",
    "Metric",
    "Schema",
    "Severity",
    "StepRecord",
    "schema_of",
]

METRIC_SCHEMA_VERSION = 1
"""Version of the metric names and their meaning; written into run.json."""

Reduction = Literal["sum", "max", "min"]
Cost = Literal["every", "sampled"]
Severity = Literal["info", "warning", "critical"]

_NAME = re.compile(r"[a-z0-9_]+/[A-Za-z0-9_]+/\S+")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Declares one metric: its name, how partial values of the ranks combine, what it costs.

    Args:
        name: ``family/stat/scope``.
        reduction: how the partial values of the ranks are combined.
        cost: ``every`` step, or ``sampled`` each N steps.

    Raises:
        InputError: the name is not of the form ``family/stat/scope``.
    """

    name: str
    reduction: Reduction = "sum"
    cost: Cost = "every"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"metric {self.name!r}: a name is family/stat/scope, such as grad/norm/total"
            )


@dataclass(frozen=True, eq=False)
class Schema:
    """The names of a record's values, in their order. Compared by identity; built once.

    Raises:
        InputError: a name appears twice.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.index) != len(self.names):
            seen: set[str] = set()
            twice = next(n for n in self.names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
            raise InputError(f"metric {twice!r} is declared twice; each name may appear once")

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each name."""
        return {name: i for i, name in enumerate(self.names)}

    def match(self, pattern: str) -> list[str]:
        """Names that match a shell-style `pattern`, in order (``*`` also matches ``/``)."""
        return fnmatch.filter(self.names, pattern)


@lru_cache(maxsize=256)
def schema_of(names: tuple[str, ...]) -> Schema:
    """The schema of a few names, the same object each time.

    Raises:
        InputError: a name appears twice.
    """
    return Schema(names)


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What was measured at one optimizer step.

    Attributes:
        step: number of the optimizer step the gradients belong to, 1 for the first.
        time: seconds since the epoch when the record was made.
        schema: names of the values.
        values: float64 array [len(schema.names)].
    """

    step: int
    time: float
    schema: Schema
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, step: int, time: float, metrics: Mapping[str, float]) -> StepRecord:
        """Builds a record of a few values."""
        return cls(
            step, time, schema_of(tuple(metrics)), np.array(list(metrics.values()), np.float64)
        )

    def __contains__(self, name: str) -> bool:
        return name in self.schema.index

    def __getitem__(self, name: str) -> float:
        return float(self.values[self.schema.index[name]])

    def get(self, name: str, default: float = float("nan")) -> float:
        """The value of `name`, or `default` where the record does not carry it."""
        i = self.schema.index.get(name)
        return default if i is None else float(self.values[i])

    def to_dict(self) -> dict[str, float]:
        """All values by name."""
        return dict(zip(self.schema.names, self.values.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, rarer than a step: start, stop, alert, evaluation, checkpoint.

    Attributes:
        kind: ``start``, ``stop``, ``alert``, ``eval``, ``checkpoint``, ``monitor``.
        step: last optimizer step when it happened.
        time: seconds since the epoch.
        data: JSON-ready details.
    """

    kind: str
    step: int
    time: float
    data: Mapping[str, Any] = field(default_factory=dict)


_NEEDED: dict[str, tuple[str, ...] | None] = {
    "add_noise": ("std",),
    "centralize": (),
    "clip_norm": ("max_norm",),
    "clip_rows": ("ratio",),
    "clip_value": ("limit",),
    "lr_factor": ("factor",),
    "scale": ("factor",),
    "scale_each": None,
}
"""The values of each kind of action; None where they are named by parameters."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a policy asks for at a step, before gradients are clipped.

    - ``add_noise``: Gaussian noise of standard deviation ``std``;
    - ``centralize``: each row of a matrix loses its mean;
    - ``clip_norm``: the targets' common norm is at most ``max_norm``;
    - ``clip_rows``: each row's norm is at most ``ratio`` of its weights' norm;
    - ``clip_value``: every element lies within plus and minus ``limit``;
    - ``lr_factor``: this step's learning rate is the scheduled one times ``factor``, in the
      parameter group numbered ``group``, or in all where it is not given;
    - ``scale``: the targets times ``factor``;
    - ``scale_each``: each parameter's gradient times the value under its name.

    Attributes:
        kind: what to do.
        values: with which numbers.
        targets: shell-style patterns of parameter names; all by default.
        reason: one sentence for people.
        read: the metrics that led to it, by name.

    Raises:
        InputError: the kind is not known, or its values are not those it needs.
    """

    kind: str
    values: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ("*",)
    reason: str = ""
    read: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in _NEEDED:
            raise InputError(
                f"action {self.kind!r} is not known{nearest(self.kind, _NEEDED)}; "
                f"allowed is one of {', '.join(_NEEDED)}"
            )
        needed = _NEEDED[self.kind]
        given = set(self.values) - ({"group"} if self.kind == "lr_factor" else set())
        if needed is not None and given != set(needed):
            raise InputError(
                f"action {self.kind}: values are {sorted(self.values)}; needed are {list(needed)}"
            )
        for name, value in self.values.items():
            if not math.isfinite(value) or value < 0:
                raise InputError(
                    f"action {self.kind}: {name} is {value}; allowed is a number from 0"
                )


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule's finding: what broke, where, at which step, why, and what to try.

    Attributes:
        rule: name of the rule.
        step: step of the record that fired it.
        metric: name of the metric that fired it.
        value: its value.
        threshold: what it was held against.
        message: one sentence for people.
        hint: what to try.
        severity: ``info``, ``warning`` or ``critical``.
    """

    rule: str
    step: int
    metric: str
    value: float
    threshold: float
    message: str
    hint: str = ""
    severity: Severity = "warning"

    def to_event(self, time: float) -> Event:
        """The alert as an event of kind ``alert``."""
        data = {
            "rule": self.rule,
            "metric": self.metric,
            "value": self.value,
            "threshold": self.threshold,
            "message": self.message,
            "hint": self.hint,
            "severity": self.severity,
        }
        return Event(kind="alert", step=self.step, time=time, data=data)


def column(history: Sequence[StepRecord], name: str) -> npt.NDArray[np.float64]:
    """Values of `name` over `history` [len(history)], NaN where a record does not carry it."""
    return np.array([record.get(name) for record in history], np.float64)


def unknown_names(names: Iterable[str], schema: Schema) -> list[str]:
    """Those of `names` that `schema` does not carry."""
    return [n for n in names if n not in schema.index]

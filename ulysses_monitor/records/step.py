"""Metrics, schemas, and the record of a step.

A `StepRecord` is one object however many metrics it carries: a `Schema`, built once, and one array
of values in the order of the schema. Names follow ``family/stat/scope``, for example
``grad/norm/layer/3`` or ``optim/exp_avg_norm/param/model.embed_tokens.weight``.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ulysses_monitor.common.errors import InputError

__all__ = ["METRIC_SCHEMA_VERSION", "Cost", "Metric", "Schema", "StepRecord", "column", "schema_of"]

METRIC_SCHEMA_VERSION = 1
"""Version of the metric names and what they mean; written to run.json."""

Reduction = Literal["sum", "max", "min"]
Cost = Literal["every", "sampled"]

_NAME = re.compile(r"[a-z0-9_]+/[A-Za-z0-9_]+/\S+")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Declares a metric: its name, how the ranks' partial values combine, and its cost.

    Args:
        name: ``family/stat/scope``.
        reduction: how the partial values of the ranks combine.
        cost: ``every`` if it is measured at each step, ``sampled`` if every N steps.

    Raises:
        InputError: the name is not of the form ``family/stat/scope``.
    """

    name: str
    reduction: Reduction = "sum"
    cost: Cost = "every"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"metric: name is {self.name!r}; expected family/stat/scope, such as "
                "grad/norm/total"
            )


@dataclass(frozen=True, eq=False)
class Schema:
    """The names of a record's values, in order. Built once and compared by identity.

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
    """Returns the schema of a few names, the same object each time.

    Raises:
        InputError: a name appears twice.
    """
    return Schema(names)


@dataclass(frozen=True, eq=False)
class StepRecord:
    """The metrics of one optimizer step.

    Attributes:
        step: number of the optimizer step that the gradients belong to, 1 for the first.
        time: when the record was made, in seconds since the epoch.
        schema: names of the values [M].
        values: float64 array [M].
    """

    step: int
    time: float
    schema: Schema
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, step: int, time: float, metrics: Mapping[str, float]) -> StepRecord:
        """Builds a record from a few values by name."""
        return cls(
            step, time, schema_of(tuple(metrics)), np.array(list(metrics.values()), np.float64)
        )

    def __contains__(self, name: str) -> bool:
        return name in self.schema.index

    def __getitem__(self, name: str) -> float:
        return float(self.values[self.schema.index[name]])

    def get(self, name: str, default: float = float("nan")) -> float:
        """Returns the value of `name`, or `default` if the record does not have it."""
        i = self.schema.index.get(name)
        return default if i is None else float(self.values[i])

    def to_dict(self) -> dict[str, float]:
        """Returns all values by name."""
        return dict(zip(self.schema.names, self.values.tolist(), strict=True))


def column(history: Sequence[StepRecord], name: str) -> npt.NDArray[np.float64]:
    """Returns the values of `name` in each record of `history`, NaN if a record lacks it."""
    values: list[float] = []
    schema, place = None, None
    for record in history:
        if record.schema is not schema:  # seldom, and a look-up for each record takes longer
            schema = record.schema
            place = schema.index.get(name)
        values.append(math.nan if place is None else record.values[place])
    return np.array(values, np.float64)

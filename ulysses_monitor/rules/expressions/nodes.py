"""What an expression is made of; each part knows its value for a history.

A number that is not known (the metric is absent, a window is not full) is NaN. A condition that is
not known is None, and so is what follows from it: `not` of an unknown condition is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ulysses_monitor.rules.history import History

__all__ = [
    "APPLIED",
    "COMPARED",
    "STATISTICS",
    "Applied",
    "Comparison",
    "Condition",
    "Constant",
    "Logic",
    "Not",
    "Number",
    "Product",
    "Reading",
    "Sum",
    "Window",
    "comparisons",
    "readings",
]

Array = npt.NDArray[np.float64]


class Number(Protocol):
    """A part that is a number."""

    def value(self, history: History) -> float:
        """Returns the number; NaN if it is not known."""
        ...


class Condition(Protocol):
    """A part that holds or does not hold."""

    def holds(self, history: History) -> bool | None:
        """Returns whether it holds; None if it is not known."""
        ...


@dataclass(frozen=True)
class Constant:
    """A number."""

    number: float

    def value(self, history: History) -> float:  # noqa: ARG002 - the protocol's
        """See `Number`."""
        return self.number


@dataclass(frozen=True)
class Reading:
    """The newest value of a metric."""

    metric: str

    def value(self, history: History) -> float:
        """See `Number`."""
        return history.last(self.metric)


@dataclass(frozen=True)
class Window:
    """A statistic of the `size` values of a metric before the newest record.

    Attributes:
        function: its name, a key of `STATISTICS`.
        metric: the metric.
        size: number of values; until there are as many, the statistic is not known.
        share: of ``quantile``, the share of values below it.
    """

    function: str
    metric: str
    size: int
    share: float = 0.0

    def value(self, history: History) -> float:
        """See `Number`."""
        past = _past(history.column(self.metric)[:-1], self.size)
        if past is None:
            return math.nan
        with np.errstate(over="ignore", invalid="ignore"):  # the result is infinite, or NaN
            found = STATISTICS[self.function](past, self.share)
        return history.last(self.metric) - found if self.function == "delta" else found


def _past(column: Array, size: int) -> Array | None:
    values = column[-size:]
    if not np.isfinite(values).all():
        values = column[np.isfinite(column)][-size:]
    return values if len(values) == size else None


def _median(values: Array, _: float) -> float:
    ordered = sorted(values.tolist())
    middle = len(ordered) // 2
    return float(ordered[middle] + ordered[~middle]) / 2.0


def _ema(values: Array, _: float) -> float:
    keep = 1.0 - 2.0 / (len(values) + 1.0)
    weights = np.power(keep, np.arange(len(values) - 1.0, -1.0, -1.0))
    return float(np.average(values, weights=weights))


STATISTICS: Mapping[str, Callable[[Array, float], float]] = {
    "median": _median,
    "mean": lambda values, _: float(values.sum() / len(values)),
    "min": lambda values, _: float(values.min()),
    "max": lambda values, _: float(values.max()),
    "std": lambda values, _: float(values.std()),
    "quantile": lambda values, share: float(np.quantile(values, share)),
    "delta": lambda values, _: float(values[0]),  # subtracted from the newest; see `Window`
    "ema": _ema,
}
"""Functions of a window. ``ema`` weights a value by (1 - 2 / (size + 1)) for each later one."""

APPLIED: Mapping[str, Callable[[float], float]] = {
    "abs": abs,
    "log": lambda x: math.log(x) if x > 0 else math.nan,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
}
"""Functions of a number."""


@dataclass(frozen=True)
class Applied:
    """A function of a number."""

    function: str
    inner: Number

    def value(self, history: History) -> float:
        """See `Number`."""
        return APPLIED[self.function](self.inner.value(history))


@dataclass(frozen=True)
class Sum:
    """Terms, each with its sign."""

    terms: tuple[tuple[float, Number], ...]

    def value(self, history: History) -> float:
        """See `Number`."""
        total = 0.0
        for sign, term in self.terms:
            total += sign * term.value(history)
        return total


@dataclass(frozen=True)
class Product:
    """Factors, each multiplied or divided by."""

    factors: tuple[tuple[str, Number], ...]

    def value(self, history: History) -> float:
        """See `Number`."""
        result = 1.0
        for sign, factor in self.factors:
            number = factor.value(history)
            if sign == "/" and number == 0:
                return math.nan
            result = result / number if sign == "/" else result * number
        return result


COMPARED: Mapping[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
"""Signs that compare two numbers."""


@dataclass(frozen=True)
class Comparison:
    """Two numbers and a sign between them.

    Attributes:
        subject: the metric that it is about.
    """

    left: Number
    sign: str
    right: Number
    subject: str

    def holds(self, history: History) -> bool | None:
        """See `Condition`."""
        left, right = self.left.value(history), self.right.value(history)
        if left != left or right != right:
            return None
        return COMPARED[self.sign](left, right)


@dataclass(frozen=True)
class Logic:
    """Conditions of which all (``and``) or any (``or``) must hold."""

    word: str
    parts: tuple[Condition, ...]

    def holds(self, history: History) -> bool | None:
        """See `Condition`."""
        decisive = self.word == "or"
        found = [part.holds(history) for part in self.parts]
        if decisive in found:
            return decisive
        return None if None in found else not decisive


@dataclass(frozen=True)
class Not:
    """A condition that must not hold."""

    inner: Condition

    def holds(self, history: History) -> bool | None:
        """See `Condition`."""
        found = self.inner.holds(history)
        return None if found is None else not found


def readings(part: object) -> Iterator[str]:
    """Yields the metrics of a part, in order; some twice."""
    match part:
        case Reading(metric) | Window(_, metric):
            yield metric
        case Applied(_, inner) | Not(inner):
            yield from readings(inner)
        case Sum(pairs) | Product(pairs):
            for _, inner in pairs:
                yield from readings(inner)
        case Comparison(left, _, right):
            yield from readings(left)
            yield from readings(right)
        case Logic(_, parts):
            for each in parts:
                yield from readings(each)


def comparisons(part: Condition) -> Iterator[Comparison]:
    """Yields the comparisons of a condition, in order."""
    match part:
        case Comparison():
            yield part
        case Not(inner):
            yield from comparisons(inner)
        case Logic(_, parts):
            for each in parts:
                yield from comparisons(each)

"""Windows that name no metric: ``median(50)`` is of the metric that its comparison is about."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_monitor.rules.expressions import nodes
from ulysses_monitor.rules.expressions.nodes import Number
from ulysses_monitor.rules.expressions.tokens import Token, problem

__all__ = ["Shorthand", "compare"]


@dataclass(frozen=True)
class Shorthand:
    """A window of the metric that the comparison is about, such as ``median(50)``."""

    function: str
    size: int
    share: float
    place: int


def compare(left: Number, sign: Token, right: Number) -> nodes.Comparison:
    """Makes a comparison; windows that name no metric are of the one that it is about."""
    named = [*nodes.readings(left), *nodes.readings(right)]
    if not named:
        short = next((s for side in (left, right) for s in _shorthands(side)), None)
        place, what = (
            (sign.place, "a comparison") if short is None else (short.place, short.function)
        )
        raise problem(place, f"{what} names no metric; write one, such as train/loss/total")
    filled = (_fill(side, named[0]) for side in (left, right))
    return nodes.Comparison(next(filled), sign.text, next(filled), named[0])


def _shorthands(part: object) -> list[Shorthand]:
    match part:
        case Shorthand():
            return [part]
        case nodes.Applied(_, inner):
            return _shorthands(inner)
        case nodes.Sum(pairs) | nodes.Product(pairs):
            return [s for _, inner in pairs for s in _shorthands(inner)]
    return []


def _fill(part: Number, metric: str) -> Number:
    match part:
        case Shorthand(function, size, share, _):
            return nodes.Window(function, metric, size, share)
        case nodes.Applied(function, inner):
            return nodes.Applied(function, _fill(inner, metric))
        case nodes.Sum(terms):
            return nodes.Sum(tuple((sign, _fill(inner, metric)) for sign, inner in terms))
        case nodes.Product(factors):
            return nodes.Product(tuple((sign, _fill(inner, metric)) for sign, inner in factors))
    return part

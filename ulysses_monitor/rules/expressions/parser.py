"""Parses an expression.

The grammar, in which a condition may stand in brackets and so may a number::

    rule       = condition ["for" INTEGER ["steps"]]
    condition  = and {"or" and}
    and        = not {"and" not}
    not        = "not" not | comparison
    comparison = sum SIGN sum                        < <= > >= == !=
    sum        = product {("+" | "-") product}
    product    = unary {("*" | "/") unary}           a division needs spaces around the /
    unary      = "-" unary | atom
    atom       = NUMBER | METRIC | FUNCTION "(" arguments ")" | "(" ... ")"
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

from ulysses_monitor.common.errors import nearest
from ulysses_monitor.rules.expressions import nodes
from ulysses_monitor.rules.expressions.nodes import Condition, Number
from ulysses_monitor.rules.expressions.shorthand import Shorthand, compare
from ulysses_monitor.rules.expressions.tokens import Token, problem, split
from ulysses_monitor.rules.history import HISTORY

__all__ = ["Parsed", "parse"]

_DEEPEST = 30
"""Brackets, signs and functions inside one another."""

_KEYWORDS = ("and", "or", "not", "for")
_FUNCTIONS = (*nodes.STATISTICS, *nodes.APPLIED)
_CONDITIONS = (nodes.Comparison, nodes.Logic, nodes.Not)

Part = Number | Condition


class Parsed(NamedTuple):
    """An expression.

    Attributes:
        condition: what must hold.
        patience: for how many steps in a row; None if the expression does not say.
    """

    condition: Condition
    patience: int | None


def parse(expression: str) -> Parsed:
    """Parses an expression.

    Raises:
        InputError: it is wrong; the message has the position.
    """
    return _Parser(list(split(expression))).parse()


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def parse(self) -> Parsed:
        condition = self._condition(self._or(), self._tokens[0].place)
        patience = self._patience() if self._take("word", "for") else None
        if (rest := self._peek()).kind != "end":
            raise problem(rest.place, f"unexpected {rest.text!r}; expected and, or, for or the end")
        return Parsed(condition, patience)

    def _patience(self) -> int:
        place = self._peek().place
        number = self._integer("for", most=1_000_000)
        self._take("word", "steps") or self._take("word", "step")
        if number < 1:
            raise problem(place, "for is 0; expected an integer of 1 or more")
        return number

    # -- conditions --------------------------------------------------------------------------------

    def _or(self) -> Part:
        return self._logic("or", lambda: self._logic("and", self._not))

    def _logic(self, word: str, inner: Callable[[], Part]) -> Part:
        place = self._peek().place
        first = inner()
        if self._peek()[:2] != ("word", word):
            return first
        parts = [self._condition(first, place)]
        while self._take("word", word):
            place = self._peek().place
            parts.append(self._condition(inner(), place))
        return nodes.Logic(word, tuple(parts))

    def _not(self) -> Part:
        token = self._peek()
        if not self._take("word", "not"):
            return self._comparison()
        with_place = self._peek().place
        return nodes.Not(self._condition(self._nested(token, self._not), with_place))

    def _comparison(self) -> Part:
        place = self._peek().place
        left = self._sum()
        sign = self._peek()
        if sign.kind != "sign" or sign.text not in nodes.COMPARED:
            return left
        self._at += 1
        left_number = self._number(left, place)
        place = self._peek().place
        right_number = self._number(self._sum(), place)
        if (more := self._peek()).text in nodes.COMPARED:
            raise problem(more.place, f"a second {more.text!r}; join two comparisons with and")
        return compare(left_number, sign, right_number)

    # -- numbers -----------------------------------------------------------------------------------

    def _sum(self) -> Part:
        place = self._peek().place
        first = self._product()
        if not self._is_sign("+-"):
            return first
        terms = [(1.0, self._number(first, place))]
        while self._is_sign("+-"):
            sign = -1.0 if self._next().text == "-" else 1.0
            place = self._peek().place
            terms.append((sign, self._number(self._product(), place)))
        return nodes.Sum(tuple(terms))

    def _product(self) -> Part:
        place = self._peek().place
        first = self._unary()
        if not self._is_sign("*/"):
            return first
        factors = [("*", self._number(first, place))]
        while self._is_sign("*/"):
            sign = self._next().text
            place = self._peek().place
            factors.append((sign, self._number(self._unary(), place)))
        return nodes.Product(tuple(factors))

    def _unary(self) -> Part:
        token = self._peek()
        if not self._is_sign("-"):
            return self._atom()
        self._at += 1
        inner = self._number(self._nested(token, self._unary), token.place + 1)
        return nodes.Sum(((-1.0, inner),))

    def _atom(self) -> Part:
        token = self._next()
        if token.kind == "number":
            return nodes.Constant(_finite(token))
        if token.kind == "metric":
            return nodes.Reading(token.text)
        if token.text == "(":
            inner = self._nested(token, self._or)
            self._expect(")")
            return inner
        if token.kind == "word" and token.text not in _KEYWORDS:
            return self._call(token)
        what = repr(token.text) if token.text else "the end"
        raise problem(token.place, f"unexpected {what}; expected a metric, a number or a function")

    def _call(self, token: Token) -> Part:
        if token.text not in _FUNCTIONS:
            hint = nearest(token.text, _FUNCTIONS)
            allowed = ", ".join(_FUNCTIONS)
            raise problem(token.place, f"unknown word {token.text!r}{hint}; allowed: {allowed}")
        self._expect("(")
        if token.text in nodes.APPLIED:
            place = self._peek().place
            inner = self._number(self._nested(token, self._sum), place)
            self._expect(")")
            return nodes.Applied(token.text, inner)
        return self._window(token)

    def _window(self, token: Token) -> Part:
        metric = self._peek().text if self._peek().kind == "metric" else None
        if metric is not None:
            self._at += 1
            self._expect(",")
        share = self._share() if token.text == "quantile" else 0.0
        size = self._integer(token.text, most=HISTORY - 1)
        if size < 1:
            raise problem(token.place, f"{token.text}: the window is 0; expected 1 or more")
        self._expect(")")
        if metric is None:
            short = Shorthand(token.text, size, share, token.place)
            return cast("Number", short)  # `compare` puts a window in its place
        return nodes.Window(token.text, metric, size, share)

    def _share(self) -> float:
        token = self._next()
        share = _finite(token) if token.kind == "number" else math.nan
        if not 0 <= share <= 1:
            got = token.text or "the end"
            raise problem(token.place, f"quantile: the share is {got}; expected 0 to 1")
        self._expect(",")
        return share

    # -- tokens ------------------------------------------------------------------------------------

    def _peek(self) -> Token:
        return self._tokens[self._at]

    def _next(self) -> Token:
        token = self._tokens[self._at]
        self._at += token.kind != "end"
        return token

    def _take(self, kind: str, text: str) -> bool:
        found = self._peek()[:2] == (kind, text)
        self._at += found
        return found

    def _is_sign(self, signs: str) -> bool:
        token = self._peek()
        return token.kind == "sign" and token.text in signs

    def _expect(self, text: str) -> None:
        token = self._next()
        if token.text != text or token.kind != "sign":
            what = repr(token.text) if token.text else "the end"
            raise problem(token.place, f"unexpected {what}; expected {text!r}")

    def _integer(self, what: str, most: int) -> int:
        token = self._next()
        value = _finite(token) if token.kind == "number" else math.nan
        if not (value.is_integer() and value <= most):
            got = token.text or "the end"
            raise problem(token.place, f"{what}: got {got}; expected an integer from 1 to {most}")
        return int(value)

    def _nested(self, token: Token, inner: Callable[[], Part]) -> Part:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise problem(token.place, f"more than {_DEEPEST} parts are inside one another")
        found = inner()
        self._depth -= 1
        return found

    @staticmethod
    def _condition(part: Part, place: int) -> Condition:
        if isinstance(part, _CONDITIONS):
            return part
        raise problem(place, "a number alone; expected a comparison, such as train/loss/total > 5")

    @staticmethod
    def _number(part: Part, place: int) -> Number:
        if isinstance(part, _CONDITIONS):
            raise problem(place, "a comparison; expected a number")
        return cast("Number", part)


def _finite(token: Token) -> float:
    value = float(token.text)
    if math.isinf(value):
        raise problem(token.place, f"{token.text} is too large")
    return value

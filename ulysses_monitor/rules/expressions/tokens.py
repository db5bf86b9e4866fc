"""Splits an expression into tokens, each with its position."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.records import Metric

__all__ = ["Kind", "Token", "problem", "split"]

Kind = Literal["number", "metric", "word", "sign", "end"]

LONGEST = 1000
"""Characters of an expression."""

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |   (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |   (?P<metric>[A-Za-z_]\w*(?:/[\w.]+)+|`[^`]*`)
    |   (?P<word>[A-Za-z_]\w*)
    |   (?P<sign><=|>=|==|!=|[-+*/()<>,])""",
    re.VERBOSE | re.ASCII,
)

_OWN = {
    "grad": "norm abs_mean max zero_frac nonfinite clip_coef mismatch",
    "param": "norm mismatch odd_rank",
    "optim": "lr update_ratio exp_avg_norm exp_avg_sq_mean",
    "lora": "grad_ratio_B_A update_ratio_A update_ratio_B delta_ratio stable_rank",
}
"""Families of which this project makes all metrics, so that another name is a mistake."""

_COMMON = (
    *("train/loss/total", "train/loss_tokens/total", "train/step_seconds/total"),
    *("train/tokens_per_second/total", "eval/loss/total", "optim/lr/0", "grad/norm/total"),
    *(f"{family}/{stat}/total" for family, stats in _OWN.items() for stat in stats.split()),
)


class Token(NamedTuple):
    """A piece of an expression.

    Attributes:
        kind: what it is.
        text: its text; of a metric the name.
        place: position of its first character, 1 for the first of the expression.
    """

    kind: Kind
    text: str
    place: int


def problem(place: int, text: str) -> InputError:
    """Returns the error about what is at `place`."""
    return InputError(f"at {place}: {text}")


def split(expression: str) -> Iterator[Token]:
    """Yields the tokens, with an ``end`` behind them.

    Raises:
        InputError: a character or a metric's name cannot be.
    """
    if len(expression) > LONGEST:
        raise problem(LONGEST + 1, f"the expression is longer than {LONGEST} characters")
    place = 0
    while place < len(expression):
        found = _TOKEN.match(expression, place)
        if found is None:
            character = expression[place]
            hint = (
                "; write `name` around a metric's name that has it" if character in "*?[]" else ""
            )
            raise problem(place + 1, f"unexpected {character!r}{hint}")
        kind, text = str(found.lastgroup), found.group()
        if kind == "metric":
            text = _check_metric(text.strip("`"), place + 1)
        if kind != "space":
            yield Token(kind, text, place + 1)  # type: ignore[arg-type]  # a group's name
        place = found.end()
    yield Token("end", "", len(expression) + 1)


def _check_metric(name: str, place: int) -> str:
    family, _, rest = name.partition("/")
    stats = _OWN.get(family, "").split()
    try:
        Metric(name=name)
        is_known = not stats or rest.split("/")[0] in (*stats, "*")
    except InputError:
        is_known = False
    if not is_known or "*" in name:
        expected = "family/stat/scope, such as grad/norm/total"
        hint = nearest(name, _COMMON)
        raise problem(place, f"{name!r} is not the name of a metric{hint}; expected {expected}")
    return name

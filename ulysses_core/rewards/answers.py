"""Finds the final answer in a text, and compares two answers."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

__all__ = ["extract_answer", "is_same_answer"]

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = "\\boxed{"
_MARKED = "####"


def extract_answer(text: str) -> str | None:
    r"""Returns the final answer of a text; None if a thought in it never ends.

    It is what follows `</think>`, and of that what is in the last `<answer>` tags, in the last
    `\boxed{}`, or behind the last `####`, as the data sets MATH and GSM8K mark answers.
    """
    _, _, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return None
    if tagged := _TAGGED.findall(rest):
        rest = tagged[-1]
    if _BOXED in rest:
        return _read_braces(rest[rest.rindex(_BOXED) + len(_BOXED) :]).strip()
    return rest.rpartition(_MARKED)[2].strip()


def _read_braces(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def is_same_answer(first: str, second: str) -> bool:
    """Compares two answers as numbers if both are, otherwise as text.

    `1,000`, `1000.0` and `$1000` are the same number. In texts case, white space and a full stop at
    the end do not count.
    """
    numbers = _as_number(first), _as_number(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _normalise(first) == _normalise(second)


def _as_number(text: str) -> Decimal | None:
    plain = text.strip().rstrip(".").strip("$ ").replace(",", "")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _normalise(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()

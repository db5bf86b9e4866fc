"""Finds patterns that match no metric, and says which name was probably meant."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Literal

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.reading.selection import SelectionError, make_name_filter
from ulysses_monitor.records.trainer_names import tag_name

__all__ = ["Missing", "UnmatchedPatterns", "check_missing", "find_unmatched", "refuse_pattern"]

Missing = Literal["raise", "ignore"]
"""What to do about a pattern or an event kind that matches nothing."""

_MAX_FAMILIES = 8

_LOG = logging.getLogger(__name__)


def check_missing(where: str, missing: str) -> None:
    """Refuses a value of the setting `missing` that is not one of `Missing`.

    Raises:
        SelectionError: `missing` is something else.
    """
    if missing not in ("raise", "ignore"):
        raise SelectionError(f"{where}: missing is {missing!r}; allowed: raise, ignore")


def find_unmatched(patterns: Sequence[str], names: Collection[str]) -> list[str]:
    """Returns those of `patterns` that match none of `names`."""
    return [p for p in patterns if not any(map(make_name_filter([p]), names))]


def refuse_pattern(where: str, pattern: str, owner: object, names: Collection[str]) -> str:
    """Returns the message for a pattern that matches none of the names that `owner` has."""
    return (
        f"{where}: pattern is {pattern!r}; expected a metric of {owner}, or a pattern that "
        f"matches one{_suggest(pattern, names)}"
    )


def _suggest(pattern: str, names: Collection[str]) -> str:
    """Suggests a name: what a Trainer's name stands for, or the one nearest to `pattern`."""
    words = pattern.strip("*/")
    # Of a metric people often remember only what a Trainer calls it: loss, grad_norm, eval_loss.
    for guess in (tag_name(words), tag_name(f"train/{words}"), f"{words}/total"):
        if guess in names:
            return f" (did you mean {guess!r}?)"
    if found := nearest(pattern, names):
        return found
    holders = [name for name in names if words and words in name]
    if holders:
        return f" (did you mean {holders[0]!r}?)"
    families = dict.fromkeys(f"{name.partition('/')[0]}/*" for name in names)
    return f", such as {', '.join(list(families)[:_MAX_FAMILIES])}" if families else ""


class UnmatchedPatterns:
    """Refuses patterns of which none matches, and warns once of each other one that does not."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def check(
        self, owner: object, patterns: Sequence[str], unmatched: Sequence[str], names: Sequence[str]
    ) -> None:
        """Raises or warns, unless there are no `names` yet, as in a run that has just started.

        Raises:
            InputError: none of `patterns` matches.
        """
        if not names:
            return
        if len(unmatched) == len(patterns):
            message = refuse_pattern("metrics", unmatched[0], owner, names)
            raise InputError(f"{message}; missing='ignore' returns an empty result")
        for pattern in unmatched:
            if pattern not in self._warned:
                self._warned.add(pattern)
                _LOG.warning("%s", refuse_pattern("metrics", pattern, owner, names))

"""What became of each rule: it fired, it was quiet, or it could not be checked, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Checks", "group_reasons", "make_checks"]

_MISSING, _OWN = " is not recorded: ", "; the rule "


@dataclass(frozen=True)
class Checks:
    """Every rule, by what became of it.

    Attributes:
        fired: those with alerts.
        quiet: those that were checked and found nothing.
        unchecked: those that could not be checked, and why.
    """

    fired: Sequence[str]
    quiet: Sequence[str]
    unchecked: Mapping[str, str]


def make_checks(rules: Iterable[str], fired: Iterable[str], unchecked: Mapping[str, str]) -> Checks:
    """Sorts rules by what became of them; what fired was checked, whatever a replay says.

    Args:
        rules: all rules.
        fired: those with alerts.
        unchecked: those that could not be checked, and why.
    """
    found = list(dict.fromkeys(fired))
    others = [rule for rule in dict.fromkeys(rules) if rule not in found]
    left = {rule: unchecked[rule] for rule in others if rule in unchecked}
    return Checks(found, [rule for rule in others if rule not in left], left)


def group_reasons(unchecked: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the rules by the reason why they could not be checked, the most frequent first.

    What a reason says of one rule alone is given behind the rule.
    """
    groups: dict[str, list[str]] = {}
    for rule, reason in unchecked.items():
        what, known, why = reason.partition(_MISSING)
        shared, _, own = what.partition(_OWN)
        key = why if known else shared
        groups.setdefault(key, []).append(f"{rule} ({own})" if own else rule)
    return dict(sorted(groups.items(), key=lambda each: -len(each[1])))

"""A reward of our own, named in grpo_mixed.yaml by its import path."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["true_steps"]

_STEP = re.compile(r"(\d+)\+(\d+)\+(\d+)=(\d+)")


def true_steps(completions: Sequence[str]) -> list[float]:
    """Returns the share of carried steps in each thought that are true additions.

    Example:
        >>> true_steps(["<think>7+5+0=12,4+8+1=12</think>122"])
        [0.5]
    """
    return [_share(completion.partition("</think>")[0]) for completion in completions]


def _share(thought: str) -> float:
    steps = thought.removeprefix("<think>").split(",")
    found = [_STEP.fullmatch(step) for step in steps]
    true = [match is not None and _is_true(match) for match in found]
    return sum(true) / len(true)


def _is_true(match: re.Match[str]) -> bool:
    first, second, carry, total = map(int, match.groups())
    return first + second + carry == total

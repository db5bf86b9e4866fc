"""What several answers to one prompt say: pass@k, majority vote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ulysses_core.rewards import extract_answer

__all__ = ["pass_at_k", "vote"]


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Estimates, without bias, the probability that one of k answers is right.

    It is 1 - C(n - c, k) / C(n, k) for n answers of which c are right (arXiv 2107.03374, eq. 1).

    Args:
        answers: n, the answers sampled for one prompt.
        right: c, how many of them are right.
        k: from 1 to n.

    Raises:
        ValueError: k is not in that range.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    if not 1 <= k <= answers:
        raise ValueError(f"k is {k}; expected a number from 1 to {answers}")
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def vote(answers: Sequence[str]) -> int | None:
    """Returns the index of the first answer with the most common final answer.

    This is self-consistency (arXiv 2203.11171). If two are equally common, the one that came first
    wins. An answer without a final answer, such as an endless thought, has no vote.

    Returns:
        The index; None if no answer has a vote.

    Example:
        >>> vote(["<think>1</think>7", "8", "<think>2</think>8"])
        1
    """
    finals = [extract_answer(answer) for answer in answers]
    counts = Counter(final for final in finals if final)
    return finals.index(counts.most_common(1)[0][0]) if counts else None

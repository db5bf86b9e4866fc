"""The texts that the clients train on; each client's file brings them into its own format."""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["Row", "rows"]

_NAMES = ("reader", "writer", "model", "layer", "batch", "step", "token", "loss", "rank", "norm")
_VERBS = ("sees", "moves", "counts", "keeps", "splits", "joins", "clips", "loads", "saves", "skips")


class Row(NamedTuple):
    """A question, a good answer and a bad one."""

    question: str
    chosen: str
    rejected: str


def rows(count: int = 48) -> list[Row]:
    """Returns `count` rows of different lengths, always the same."""
    source = random.Random(0)
    return [_row(source) for _ in range(count)]


def _row(source: random.Random) -> Row:
    noun, verb = source.choice(_NAMES), source.choice(_VERBS)
    rest = " ".join(f"the {source.choice(_NAMES)}" for _ in range(source.randint(1, 5)))
    return Row(f"What {verb} {rest}?", f"The {noun} {verb} {rest}.", f"Nothing {verb} {noun}.")

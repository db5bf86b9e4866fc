"""Turns documented objects into question/answer pairs and pre-training texts."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .docstrings import find_documented, find_sources

__all__ = ["Pair", "build_pairs", "pretraining_text", "split_pairs"]

QUESTIONS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Give an overview of the `{name}` module.",
        "What does the standard library module `{name}` provide?",
        "Describe the module `{name}`.",
    ),
    "class": (
        "What is the class `{name}`?",
        "Describe the Python class `{name}`.",
        "What is `{name}` used for?",
        "Explain the class `{name}` from the standard library.",
    ),
    "property": (
        "What does the property `{name}` give?",
        "Describe the property `{name}`.",
        "What is `{name}`?",
    ),
    "special form": (
        "What is `{name}`?",
        "What does `{name}` mean?",
        "What is `{name}` used for?",
    ),
    "function": (
        "What does `{name}` do?",
        "Explain the {kind} `{name}`.",
        "How does `{name}` behave?",
        "Describe the Python {kind} `{name}`.",
        "What is `{name}` used for?",
    ),
}
QUESTIONS["method"] = QUESTIONS["function"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A documented object as a question and its answer."""

    name: str
    """Qualified name, such as `json.dumps`."""
    heading: str
    """The name, and for a function its signature."""
    question: str
    answer: str


def build_pairs(root: Path | None = None, seed: int = 0) -> list[Pair]:
    """Build one pair for each documented object, in a fixed order, without repeated answers.

    Args:
        root: Folder with the standard library's sources; this Python's if None.
        seed: Decides the wording of each question.
    """
    rng = random.Random(seed)  # noqa: S311 - wording, not secrets
    names: set[str] = set()
    answers: set[str] = set()
    pairs: list[Pair] = []
    for kind, name, heading, answer in _all_objects(root or Path(sysconfig.get_path("stdlib"))):
        key = _answer_key(answer)
        if name in names or key in answers:
            continue
        names.add(name)
        answers.add(key)
        question = rng.choice(QUESTIONS[kind]).format(kind=kind, name=heading)
        pairs.append(Pair(name=name, heading=heading, question=question, answer=answer))
    return pairs


def _all_objects(root: Path) -> Iterator[tuple[str, str, str, str]]:
    for module, path in find_sources(root):
        try:
            tree = ast.parse(path.read_bytes())  # bytes: the file may declare its own encoding
        except (SyntaxError, ValueError):
            continue  # a template or a broken sample that a distribution added
        yield from find_documented(module, tree)


def _answer_key(answer: str) -> str:
    # Copies of a docstring often differ only in layout and punctuation.
    return re.sub(r"\W+", " ", answer).strip().casefold()


def split_pairs(pairs: Sequence[Pair], heldout: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return `(train, held out)`, both in the order of `pairs`.

    A drawn pair whose answer is also part of another text stays in train, so that no held-out
    answer is seen in training.
    """
    rng = random.Random(seed)  # noqa: S311 - a split, not secrets
    drawn = set(rng.sample(range(len(pairs)), round(heldout * len(pairs))))
    rest = "\n".join(_answer_key(p.answer) for i, p in enumerate(pairs) if i not in drawn)
    drawn = {i for i in drawn if _answer_key(pairs[i].answer) not in rest}
    train = [pair for i, pair in enumerate(pairs) if i not in drawn]
    return train, [pairs[i] for i in sorted(drawn)]


def pretraining_text(pair: Pair) -> str:
    """Return a heading line with the object's signature, then its docstring."""
    return f"{pair.heading}\n\n{pair.answer}"

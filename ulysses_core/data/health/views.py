"""One view of a tokenised row, whatever stage made it, and of the texts that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ulysses_core.data.messages import Example, Pair, Tagged
from ulysses_core.data.prompts import Prompt
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["View", "list_texts", "view_row"]


@dataclass(frozen=True, slots=True)
class View:
    """A tokenised row.

    Attributes:
        ids: all its tokens; of a pair the prompt once, then both answers.
        trained: the tokens that have a label; of a pair those of both answers.
        ends: the sequences that a model should learn to end.
        sides: of a pair, the lengths of the chosen and the rejected answer.
        is_desirable: the tag of stage kto.
    """

    ids: Sequence[int]
    trained: Sequence[int]
    ends: Sequence[Sequence[int]] = ()
    sides: tuple[int, int] | None = None
    is_desirable: bool | None = None


def view_row(row: dict[str, Any]) -> View:
    """Returns the view of a row as its stage tokenised it."""
    if "input_ids" in row:
        labels = row["labels"]
        trained = [label for label in labels[1:] if label != IGNORE_INDEX]
        return View(row["input_ids"], trained, (trained,))
    if "completion_ids" in row:
        answer = row["completion_ids"]
        ids = row["prompt_ids"] + answer
        return View(ids, answer, (answer,), is_desirable=bool(row["label"]))
    if "chosen_ids" in row:
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        ids = row.get("prompt_ids", []) + chosen + rejected
        return View(ids, chosen + rejected, (chosen, rejected), (len(chosen), len(rejected)))
    return View(row["prompt"], ())


def list_texts(example: Any) -> Iterator[str]:
    """Yields the texts of an example that come from the data, not from a template."""
    if isinstance(example, str):
        yield example
    elif isinstance(example, Example):
        yield example.system
        for message in example.messages:
            yield message.content
            yield from message.more
    elif isinstance(example, Pair):
        yield from list_texts(example.chosen)
        yield example.rejected.messages[-1].content
    elif isinstance(example, Tagged | Prompt):
        yield from list_texts(example.example)

"""The answers of an event of kind ``answers``, which may come from a damaged or foreign file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

__all__ = ["SampledAnswer", "read_answers"]


@dataclass(frozen=True)
class SampledAnswer:
    """What a model answered to a prompt.

    Attributes:
        prompt: the prompt.
        text: the answer.
        reference: the answer in the data; None if there is none.
    """

    prompt: str
    text: str
    reference: str | None


def read_answers(data: Mapping[str, Any]) -> list[SampledAnswer]:
    """Returns the answers in an event's data: equally long lists of texts.

    They are ``prompts``, ``answers`` and perhaps ``references``. What is not a list counts as
    empty; answers without a prompt, or the other way round, are left out.
    """
    prompts, answers, references = (
        _as_list(data.get(key)) for key in ("prompts", "answers", "references")
    )
    count = min(len(prompts), len(answers))
    rows = zip_longest(prompts[:count], answers[:count], references[:count])
    return [
        SampledAnswer(str(prompt), str(answer), None if reference is None else str(reference))
        for prompt, answer, reference in rows
    ]


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []

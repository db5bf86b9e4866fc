"""The project's own rewards, each between 0 and 1."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_core.rewards.answers import extract_answer, is_same_answer

__all__ = ["ExactAnswer", "Format", "LanguageConsistency"]

_THOUGHT = re.compile(r"\s*<think>(?P<thought>.+?)</think>(?P<answer>.+)", re.DOTALL)


@dataclass(frozen=True)
class ExactAnswer:
    """1 if the final answer is the row's, 0 if not; no reward for a row without an answer.

    `extract_answer` finds both answers, so a row's may come with its reasoning.
    """

    def score(
        self, completions: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        """Returns the reward of each completion."""
        return [self._score(*pair) for pair in zip(completions, answers, strict=True)]

    def _score(self, completion: str, answer: str | None) -> float | None:
        expected = None if answer is None else extract_answer(answer)
        if not expected:
            return None
        found = extract_answer(completion)
        return float(found is not None and is_same_answer(found, expected))


@dataclass(frozen=True)
class Format:
    """1 if a completion is one thought in `<think>…</think>` and then an answer, otherwise 0."""

    opened: bool = False
    """Whether the prompt ends with `<think>`, so that completions start within the thought."""

    def score(self, completions: Sequence[str]) -> list[float]:
        """Returns the reward of each completion."""
        return [self._score(completion) for completion in completions]

    def _score(self, completion: str) -> float:
        match = _THOUGHT.fullmatch(("<think>" if self.opened else "") + completion)
        if match is None or not all(part.strip() for part in match.groups()):
            return 0.0
        return float(not any(tag in part for part in match.groups() for tag in _TAGS))


_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class LanguageConsistency:
    """Share of a completion's letters that are of the prompt's script, such as Latin or Han.

    DeepSeek-R1 (arXiv 2501.12948, section 2.3.2) rewards the share of words in the target
    language. A completion without letters gets 1.
    """

    script: str = ""
    """First word of the letters' Unicode names, such as LATIN, CYRILLIC or CJK; the prompt's."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Returns the reward of each completion."""
        return [self._score(*pair) for pair in zip(prompts, completions, strict=True)]

    def _score(self, prompt: str, completion: str) -> float:
        found, wanted = _count_scripts(completion), self.script.upper()
        if not wanted and (of_prompt := _count_scripts(prompt)):
            [(wanted, _)] = of_prompt.most_common(1)
        if not wanted or not found:
            return 1.0
        return found[wanted] / found.total()


def _count_scripts(text: str) -> Counter[str]:
    names = (unicodedata.name(character, "") for character in text if character.isalpha())
    return Counter(name.split(" ")[0] for name in names)

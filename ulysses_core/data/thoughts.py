"""Thoughts before answers: which are kept, and where an empty one is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ulysses_core.data.messages import ANSWER_ROLES, Message

__all__ = ["Thinking", "has_thought", "prepare_messages", "remove_thought"]


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What happens to the thoughts of answers, in templates that have them."""

    enabled: bool | None = True
    """True trains the model to write a thought, an empty one where an answer has none. False
    removes the thoughts. Unless it is true, an empty thought belongs to the prompt."""
    keeps_history: bool = True
    """Whether earlier answers keep their thoughts."""
    fills_history: bool = True
    """Whether earlier answers without a thought get an empty one too."""


def prepare_messages(
    messages: Sequence[Message], thinking: Thinking, words: tuple[str, str]
) -> list[Message]:
    """Returns messages without the thoughts that are not to be kept."""
    last = len(messages) - 1
    kept = []
    for index, message in enumerate(messages):
        is_kept = thinking.enabled is not False and (thinking.keeps_history or index == last)
        is_answer = message.role in ANSWER_ROLES
        text = message.content if is_kept or not is_answer else remove_thought(message, words)
        kept.append(replace(message, content=text))
    return kept


def remove_thought(message: Message, words: tuple[str, str]) -> str:
    """Returns the text of a message without its thoughts."""
    start, end = map(re.escape, words)
    return re.sub(f"{start}.*?{end}", "", message.content, flags=re.DOTALL).lstrip("\n")


def has_thought(message: Message, words: tuple[str, str]) -> bool:
    """Returns whether a message has the begin or the end of a thought."""
    return any(word.strip() in message.content for word in words)

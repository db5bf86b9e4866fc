"""Tokenises conversations with a chat template.

A turn is a pair of a prompt (everything up to the answer) and an answer, both lists of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ulysses_core.data.chat_template import render_chat_template
from ulysses_core.data.examples import Example, Message
from ulysses_core.data.templates import Template, get_template
from ulysses_core.data.tool_calls import THOUGHT, parse_calls, render_calls
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Turn", "encode_batch", "encode_turns"]

Turn = tuple[list[int], list[int]]
Elements = list[str | int]
"""Pieces of a text: strings, which are tokenised separately, and token ids."""

_CONTROL = re.compile(r"(\{bos\}|\{eos\})")
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    example: Example,
    *,
    default_system: str | None = None,
    last_turn_only: bool = False,
) -> list[Turn]:
    """Returns the (prompt ids, answer ids) of each turn of one conversation; see `encode_batch`."""
    [turns] = encode_batch(
        tokenizer,
        template,
        [example],
        default_system=default_system,
        last_turn_only=last_turn_only,
    )
    return turns


def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    examples: Sequence[Example],
    *,
    default_system: str | None = None,
    last_turn_only: bool = False,
) -> list[list[Turn]]:
    """Renders conversations and tokenises them all in one call of the tokenizer.

    Args:
        tokenizer: The tokenizer; it also gives the chat template if `template` is None.
        template: A name in `TEMPLATES`. None uses the tokenizer's own chat template, or `default`
            if it has none.
        examples: The conversations.
        default_system: Replaces the template's own default system text.
        last_turn_only: Whether only the last answer is trained on. Templates with thoughts then
            remove the `<think>` blocks of earlier answers.

    Returns:
        The turns of each conversation.

    Raises:
        InputError: The template is unknown, needs a token that the tokenizer lacks, or is the
            tokenizer's own and cannot be split into prompts and answers.
    """
    rendered: list[list[tuple[Elements, Elements]]]
    if template is None and tokenizer.chat_template:
        rendered = [
            [([prompt], [answer]) for prompt, answer in pairs]
            for pairs in (
                render_chat_template(tokenizer, example, default_system) for example in examples
            )
        ]
    else:
        name = template or "default"
        chosen = get_template(name)
        if default_system is not None:
            chosen = replace(chosen, default_system=default_system)
        writer = _Writer(name, chosen, tokenizer.bos_token_id, tokenizer.eos_token_id)
        rendered = [writer.write_turns(example, last_turn_only) for example in examples]
    return _tokenise(tokenizer, rendered)


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, rendered: list[list[tuple[Elements, Elements]]]
) -> list[list[Turn]]:
    parts = [part for turns in rendered for turn in turns for part in turn]
    texts = [element for part in parts for element in part if isinstance(element, str)]
    # Text that spells a special token becomes that token, also in user content. This is
    # LLaMA-Factory's `split_special_tokens: false`, which the templates' own tags need.
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])

    def encode_next(part: Elements) -> list[int]:
        ids: list[int] = []
        for element in part:
            ids += next(encoded) if isinstance(element, str) else [element]
        return ids

    # A tuple's items are evaluated from left to right, which is the order of `texts`.
    return [
        [(encode_next(prompt), encode_next(answer)) for prompt, answer in turns]
        for turns in rendered
    ]


@dataclass(frozen=True)
class _Writer:
    """Writes conversations with one template and one tokenizer's control tokens."""

    name: str
    template: Template
    bos: int | None
    eos: int | None

    def write_turns(
        self, example: Example, last_turn_only: bool
    ) -> list[tuple[Elements, Elements]]:
        messages = list(example.messages)
        if self.template.has_thoughts and last_turn_only:
            messages[:-1] = [_remove_thought(message) for message in messages[:-1]]
        turns = []
        for start in range(0, len(messages), 2):
            prompt, answer = messages[start : start + 2]
            is_last = start + 2 == len(messages)
            opening = self._write_opening(example.system) if start == 0 else []
            system = self._write_system_in_user(example.system) if start == 0 else ""
            answer_elements = self._write_message(answer)
            is_trained = is_last or not last_turn_only
            if self.template.has_thoughts and is_trained and not _has_thought(answer):
                answer_elements.insert(0, _EMPTY_THOUGHT)
            turns.append((opening + self._write_message(prompt, system), answer_elements))
        return turns

    def _write_opening(self, system: str) -> Elements:
        opening = self._fill(self.template.prefix)
        text = system or self.template.default_system
        if text and not self.template.system_in_user:
            opening += self._fill(self.template.system, text)
        return opening

    def _write_system_in_user(self, system: str) -> str:
        text = system or self.template.default_system
        if not text or not self.template.system_in_user:
            return ""
        return self.template.system.replace("{content}", text)

    def _write_message(self, message: Message, system: str = "") -> Elements:
        template = self.template
        if message.role == "user":
            return self._fill(template.user, system + message.content)
        if message.role == "assistant":
            return self._fill(template.assistant, message.content)
        if message.role == "observation":
            return self._fill(template.observation or template.user, message.content)
        before, calls = parse_calls(message.content)
        content = before + render_calls(calls, template.tool_style)
        return self._fill(template.function or template.assistant, content)

    def _fill(self, form: str, content: str = "") -> Elements:
        elements: Elements = []
        # The form is split before the content is inserted, so content cannot add control tokens.
        for piece in _CONTROL.split(form):
            if piece == "{eos}":
                elements.append(self._require_eos())
            elif piece == "{bos}":
                elements += [] if self.bos is None else [self.bos]
            elif text := piece.replace("{content}", content):
                elements.append(text)
        return elements

    def _require_eos(self) -> int:
        if self.eos is None:
            raise InputError(
                f"template {self.name!r} needs an end-of-sequence token, and the tokenizer has "
                "none; set the tokenizer's eos_token, or choose another template"
            )
        return self.eos


def _remove_thought(message: Message) -> Message:
    if message.role not in ("assistant", "function"):
        return message
    return replace(message, content=THOUGHT.sub("", message.content).lstrip("\n"))


def _has_thought(message: Message) -> bool:
    return "<think>" in message.content or "</think>" in message.content

"""The tokens of a conversation under a chat template.

A turn is a pair: the prompt (everything up to the answer) and the answer, each a list of token ids.
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
"""Pieces of a text: strings, each tokenised on its own, and token ids."""

_CONTROL = re.compile(r"(\{bos\}|\{eos\})")
_NO_THOUGHT = "<think>\n\n</think>\n\n"


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
    """Renders and tokenises conversations, with one call of the tokenizer for all of them.

    Args:
        tokenizer: Gives the tokens, and the chat template where `template` is None.
        template: A name in `TEMPLATES`. None takes the tokenizer's own chat template, or `default`
            where it has none.
        examples: The conversations.
        default_system: Replaces the template's own default system text.
        last_turn_only: Only the last answer is learned: earlier ones lose their `<think>` blocks
            under templates that think.

    Returns:
        For each conversation, its turns.

    Raises:
        InputError: The template is unknown, needs a token that the tokenizer lacks, or (a
            tokenizer's own one) cannot be split into prompts and answers.
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
        rendered = [writer.turns(example, last_turn_only) for example in examples]
    return _tokenise(tokenizer, rendered)


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, rendered: list[list[tuple[Elements, Elements]]]
) -> list[list[Turn]]:
    sides = [side for turns in rendered for turn in turns for side in turn]
    texts = [element for side in sides for element in side if isinstance(element, str)]
    # Text that spells a special token becomes that token, in user content too: LLaMA-Factory's
    # `split_special_tokens: false`, which the templates' own marks need.
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])

    def ids(side: Elements) -> list[int]:
        found: list[int] = []
        for element in side:
            found += next(encoded) if isinstance(element, str) else [element]
        return found

    # In the order of `texts`: a tuple's items are evaluated from left to right.
    return [[(ids(prompt), ids(answer)) for prompt, answer in turns] for turns in rendered]


@dataclass(frozen=True)
class _Writer:
    """Writes conversations in a template, for one tokenizer's control tokens."""

    name: str
    template: Template
    bos: int | None
    eos: int | None

    def turns(self, example: Example, last_turn_only: bool) -> list[tuple[Elements, Elements]]:
        messages = list(example.messages)
        if self.template.thinks and last_turn_only:
            messages[:-1] = [_without_thought(message) for message in messages[:-1]]
        pairs = []
        for start in range(0, len(messages), 2):
            ask, answer = messages[start : start + 2]
            last = start + 2 == len(messages)
            before = self._opening(example.system) if start == 0 else []
            system = self._system_inside(example.system) if start == 0 else ""
            answer_elements = self._message(answer)
            if self.template.thinks and (last or not last_turn_only) and _is_bare(answer):
                answer_elements.insert(0, _NO_THOUGHT)
            pairs.append((before + self._message(ask, system), answer_elements))
        return pairs

    def _opening(self, system: str) -> Elements:
        opening = self._fill(self.template.prefix)
        text = system or self.template.default_system
        if text and not self.template.system_in_user:
            opening += self._fill(self.template.system, text)
        return opening

    def _system_inside(self, system: str) -> str:
        text = system or self.template.default_system
        if not text or not self.template.system_in_user:
            return ""
        return self.template.system.replace("{content}", text)

    def _message(self, message: Message, system: str = "") -> Elements:
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
        # The form is cut before the content goes in, so that content cannot add control tokens.
        for piece in _CONTROL.split(form):
            if piece == "{eos}":
                elements.append(self._eos())
            elif piece == "{bos}":
                elements += [] if self.bos is None else [self.bos]
            elif text := piece.replace("{content}", content):
                elements.append(text)
        return elements

    def _eos(self) -> int:
        if self.eos is None:
            raise InputError(
                f"template {self.name!r} needs an end-of-sequence token and the tokenizer has "
                "none: set the tokenizer's eos_token, or choose another template"
            )
        return self.eos


def _without_thought(message: Message) -> Message:
    if message.role not in ("assistant", "function"):
        return message
    return replace(message, content=THOUGHT.sub("", message.content).lstrip("\n"))


def _is_bare(message: Message) -> bool:
    return "<think>" not in message.content and "</think>" not in message.content

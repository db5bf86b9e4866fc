"""Tokenises conversations with a chat template.

A turn is a pair of a prompt (everything up to the answer) and an answer, both lists of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ulysses_core.data.chat_template import render_chat_template
from ulysses_core.data.messages import Example, Message
from ulysses_core.data.template import Template
from ulysses_core.data.templates import get_template
from ulysses_core.data.thoughts import Thinking, has_thought, prepare_messages
from ulysses_core.data.tool_calls import ToolStyle, parse_calls, render_calls
from ulysses_core.data.tool_texts import join_observations, render_tools
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Turn", "encode_batch", "encode_turns", "find_end"]

Turn = tuple[list[int], list[int]]
Elements = list[str | int]
"""Pieces of a text: strings, which are tokenised separately, and token ids."""

_CONTROL = re.compile(r"(\{bos\}|\{eos\})")


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    example: Example,
    *,
    default_system: str | None = None,
    tool_format: ToolStyle | None = None,
    thinking: Thinking | None = None,
) -> list[Turn]:
    """Returns the (prompt ids, answer ids) of each turn of one conversation; see `encode_batch`."""
    [turns] = encode_batch(
        tokenizer,
        template,
        [example],
        default_system=default_system,
        tool_format=tool_format,
        thinking=thinking,
    )
    return turns


def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    examples: Sequence[Example],
    *,
    default_system: str | None = None,
    tool_format: ToolStyle | None = None,
    thinking: Thinking | None = None,
) -> list[list[Turn]]:
    """Renders conversations and tokenises them all in one call of the tokenizer.

    Args:
        tokenizer: The tokenizer; it also gives the chat template if `template` is None.
        template: A name in `TEMPLATES`. None uses the tokenizer's own chat template, or `default`
            if it has none.
        examples: The conversations.
        default_system: Replaces the template's own default system text.
        tool_format: How tools and calls are written, instead of the template's own way.
        thinking: What happens to thoughts, in templates that have them.

    Returns:
        The turns of each conversation.

    Raises:
        InputError: The template is unknown, needs a token that the tokenizer lacks, or is the
            tokenizer's own and cannot be split into prompts and answers; or a conversation has
            calls that the tool format cannot write.
    """
    rendered: list[list[tuple[Elements, Elements]]]
    enabled = thinking.enabled if thinking else True
    if template is None and tokenizer.chat_template:
        rendered = [
            [([prompt], [answer]) for prompt, answer in pairs]
            for pairs in (
                render_chat_template(tokenizer, example, default_system, enabled)
                for example in examples
            )
        ]
    else:
        name = template or "default"
        chosen = get_template(name)
        if default_system is not None:
            chosen = replace(chosen, default_system=default_system)
        if tool_format is not None:
            function = "{content}" if chosen.ends_with_eos else "{content}{eos}"
            chosen = replace(chosen, tool_style=tool_format, function=function)
        control = tokenizer.bos_token_id, tokenizer.eos_token_id
        writer = _Writer(name, chosen, *control, thinking or Thinking())
        rendered = [writer.write_turns(example) for example in examples]
    return _tokenise(tokenizer, rendered)


def find_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[int]:
    """Returns the token that follows the last answer in a template whose answers have no end.

    Raises:
        InputError: The tokenizer has no such token.
    """
    if template is None or not (chosen := get_template(template)).ends_with_eos:
        return []
    writer = _Writer(template, chosen, tokenizer.bos_token_id, tokenizer.eos_token_id, Thinking())
    return [writer.require_eos()]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, rendered: list[list[tuple[Elements, Elements]]]
) -> list[list[Turn]]:
    parts = [part for turns in rendered for turn in turns for part in turn]
    texts = [element for part in parts for element in part if isinstance(element, str)]
    # Text that spells a special token becomes that token, also in user content. This is
    # LLaMA-Factory's `split_special_tokens: false`, which the templates' own tags need.
    ids_only = {"return_attention_mask": False, "return_token_type_ids": False}
    encode = partial(tokenizer, add_special_tokens=False, **ids_only)
    encoded = iter(encode(texts)["input_ids"] if texts else [])

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
    thinking: Thinking

    def write_turns(self, example: Example) -> list[tuple[Elements, Elements]]:
        messages = list(example.messages)
        if self.template.has_thoughts:
            messages = prepare_messages(messages, self.thinking, self.template.thought)
        turns = []
        for start in range(0, len(messages), 2):
            prompt, answer = messages[start : start + 2]
            opening, system = self._write_opening(example) if start == 0 else ([], "")
            prompt_elements = opening + self._write_message(prompt, example, system)
            answer_elements = self._write_message(answer, example)
            if self._needs_thought(answer, is_last=start + 2 == len(messages)):
                side = answer_elements if self.thinking.enabled else prompt_elements
                side.insert(0 if self.thinking.enabled else len(side), self._empty_thought())
            turns.append((prompt_elements, answer_elements))
        return turns

    def _needs_thought(self, answer: Message, *, is_last: bool) -> bool:
        if not self.template.has_thoughts or has_thought(answer, self.template.thought):
            return False
        return is_last or self.thinking.fills_history

    def _empty_thought(self) -> str:
        return "".join(self.template.thought)

    def _write_opening(self, example: Example) -> tuple[Elements, str]:
        """Returns what precedes the first turn, and what the first user turn begins with."""
        template = self.template
        text = example.system or template.default_system
        text += render_tools(example.tools, template.tool_style)
        opening = self._fill(template.prefix)
        if text and template.system_in_user:
            return opening, template.system.replace("{content}", text)
        return opening + (self._fill(template.system, text) if text else []), ""

    def _write_message(self, message: Message, example: Example, system: str = "") -> Elements:
        template = self.template
        if message.role == "user":
            return self._fill(template.user, system + message.content)
        if message.role == "assistant":
            return self._fill(template.assistant, message.content)
        if message.role == "observation":
            results = join_observations((message.content, *message.more), template.tool_style)
            return self._fill(template.observation or template.user, results)
        before, calls = parse_calls(message.content, template.thought)
        try:
            content = before + render_calls(calls, template.tool_style)
        except ValueError as error:
            place = f"{example.where}: " if example.where else ""
            raise InputError(f"{place}{error}; set another tool_format") from None
        return self._fill(template.function or template.assistant, content)

    def _fill(self, form: str, content: str = "") -> Elements:
        elements: Elements = []
        # The form is split before the content is inserted, so content cannot add control tokens.
        for piece in _CONTROL.split(form):
            if piece == "{eos}":
                elements.append(self.require_eos())
            elif piece == "{bos}":
                elements += [] if self.bos is None else [self.bos]
            elif text := piece.replace("{content}", content):
                elements.append(text)
        return elements

    def require_eos(self) -> int:
        """Returns the end-of-sequence token, or raises `InputError`."""
        if self.eos is None:
            raise InputError(
                f"template {self.name!r} needs an end-of-sequence token, and the tokenizer has "
                "none; set the tokenizer's eos_token, or choose another template"
            )
        return self.eos

"""Splits a conversation into turns by means of the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from ulysses_core.data.examples import Example, Message
from ulysses_core.data.tool_calls import parse_calls
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["render_chat_template"]


def render_chat_template(
    tokenizer: PreTrainedTokenizerBase, example: Example, default_system: str | None
) -> list[tuple[str, str]]:
    """Returns the (prompt, answer) texts of each turn.

    The conversation is rendered up to each answer and past it. Each rendering must begin the next
    one, or there is no place at which to cut the whole.

    Raises:
        InputError: The chat template refuses the conversation, or rewrites its earlier turns.
    """
    system = example.system or default_system or ""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    first = len(messages)
    messages += [_as_dict(message) for message in example.messages]
    whole = _render(tokenizer, messages, example, asks=False)
    turns: list[tuple[str, str]] = []
    cut = 0
    for end in range(first + 2, len(messages) + 1, 2):
        prompt = _render(tokenizer, messages[: end - 1], example, asks=True)
        turn = _render(tokenizer, messages[:end], example, asks=False)
        if not (turn.startswith(prompt) and whole.startswith(turn) and len(prompt) >= cut):
            raise InputError(
                f"{_place(example)}the tokenizer's chat template cannot be cut at turn "
                f"{end - first}: it writes a conversation's beginning differently once more turns "
                "follow; set template to one of the named templates"
            )
        turns.append((whole[cut : len(prompt)], whole[len(prompt) : len(turn)]))
        cut = len(turn)
    return turns


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    example: Example,
    *,
    asks: bool,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{_place(example)}the tokenizer's chat template refuses the conversation "
            f"({error}); set template to one of the named templates"
        ) from None


def _as_dict(message: Message) -> dict[str, Any]:
    if message.role == "observation":
        return {"role": "tool", "content": message.content}
    if message.role != "function":
        return {"role": message.role, "content": message.content}
    before, calls = parse_calls(message.content)
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return {
        "role": "assistant",
        "content": before,
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def _place(example: Example) -> str:
    return f"{example.where}: " if example.where else ""

"""Splits a conversation into turns with the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from ulysses_core.data.messages import Example, Message
from ulysses_core.data.tool_calls import parse_calls
from ulysses_core.data.tool_texts import wrap_tool
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["render_chat_template"]


def render_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    default_system: str | None,
    enable_thinking: bool | None = True,
) -> list[tuple[str, str]]:
    """Returns the (prompt, answer) texts of each turn.

    The conversation is rendered up to each answer, and again including it. Each rendering must be
    a prefix of the next; otherwise the text cannot be cut into turns.

    Raises:
        InputError: The chat template rejects the conversation, or rewrites its earlier turns.
    """
    system = example.system or default_system or ""
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    options: dict[str, Any] = {}
    if example.tools:
        options["tools"] = [wrap_tool(tool) for tool in example.tools]
    if enable_thinking is False:
        options["enable_thinking"] = False

    def render(count: int, *, add_prompt: bool) -> str:
        shown = [entry for message in example.messages[:count] for entry in _as_dicts(message)]
        return _render(tokenizer, opening + shown, example, add_prompt, options)

    conversation = render(len(example.messages), add_prompt=False)
    turns: list[tuple[str, str]] = []
    cut = 0
    for end in range(2, len(example.messages) + 1, 2):
        prompt = render(end - 1, add_prompt=True)
        turn = render(end, add_prompt=False)
        is_prefix = turn.startswith(prompt) and conversation.startswith(turn)
        if not is_prefix or len(prompt) < cut:
            raise InputError(
                f"{_describe_place(example)}the tokenizer's chat template cannot be split at turn "
                f"{end}, because it rewrites earlier turns when more follow; "
                "set template to one of the named templates"
            )
        turns.append((conversation[cut : len(prompt)], conversation[len(prompt) : len(turn)]))
        cut = len(turn)
    return turns


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    example: Example,
    add_prompt: bool,
    options: dict[str, Any],
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_prompt, **options
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{_describe_place(example)}the tokenizer's chat template rejects the conversation "
            f"({error}); set template to one of the named templates"
        ) from None


def _as_dicts(message: Message) -> list[dict[str, Any]]:
    if message.role == "observation":
        results = (message.content, *message.more)
        return [{"role": "tool", "content": result} for result in results]
    if message.role != "function":
        return [{"role": message.role, "content": message.content}]
    before, calls = parse_calls(message.content)
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    tool_calls = [wrap_tool(function) for function in functions]
    return [{"role": "assistant", "content": before, "tool_calls": tool_calls}]


def _describe_place(example: Example) -> str:
    return f"{example.where}: " if example.where else ""

"""Reads the calls in a `function` turn, and writes them the way a model family expects."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["THOUGHT", "ToolCall", "ToolStyle", "parse_calls", "render_calls"]

ToolStyle = Literal["default", "qwen", "llama3", "mistral"]

_WRAPPED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"<think>\n.*?\n</think>\n\n", re.DOTALL)
"""A block of reasoning before an answer."""


@dataclass(frozen=True)
class ToolCall:
    """One call: a function's name and its JSON arguments."""

    name: str
    arguments: Any


def parse_calls(content: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Splits a `function` turn into the text before its calls and the calls.

    Args:
        content: A JSON object with `name` and `arguments`, or a list of them; alone, after a
            `<think>` block, or inside `<tool_call>` marks with any text before them.

    Raises:
        ValueError: The calls are not such JSON.
    """
    before, body = "", content
    if wrapped := _WRAPPED_CALL.search(content):
        before, body = content.replace(wrapped[0], ""), wrapped[1]
    elif thought := THOUGHT.search(content):
        before, body = thought[0], content.replace(thought[0], "")
    calls = json.loads(body)
    try:
        listed = calls if isinstance(calls, list) else [calls]
        return before, tuple(ToolCall(call["name"], call["arguments"]) for call in listed)
    except (KeyError, TypeError):
        raise ValueError("each call needs the keys name and arguments") from None


def render_calls(calls: Sequence[ToolCall], style: ToolStyle) -> str:
    """Returns the text of `calls` in the style of a model family."""
    if style == "default":
        return "\n".join(
            f"Action: {call.name}\nAction Input: {_json(call.arguments)}" for call in calls
        )
    key = "parameters" if style == "llama3" else "arguments"
    objects = [{"name": call.name, key: call.arguments} for call in calls]
    if style == "qwen":
        return "\n".join(f"<tool_call>\n{_json(item)}\n</tool_call>" for item in objects)
    if style == "llama3" and len(objects) == 1:
        return _json(objects[0])
    return _json(objects)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)

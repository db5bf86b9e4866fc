"""Parses the calls in a `function` turn and renders them in the style of a model family."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["TOOL_STYLES", "ToolCall", "ToolStyle", "parse_calls", "render_calls"]

ToolStyle = Literal["default", "glm4", "llama3", "mistral", "phi4", "qwen"]
TOOL_STYLES: tuple[str, ...] = get_args(ToolStyle)

_WRAPPED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THOUGHT = re.compile(r"<think>\n.*?\n</think>\n\n", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its JSON arguments."""

    name: str
    arguments: Any


def parse_calls(content: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Splits a `function` turn into the text before its calls and the calls.

    Args:
        content: A JSON object with `name` and `arguments`, or a list of such objects. It may stand
            alone, follow a `<think>` block, or be inside `<tool_call>` tags that follow any text.

    Raises:
        ValueError: The calls are not JSON of this form.
    """
    before, body = "", content
    if wrapped := _WRAPPED_CALL.search(content):
        before, body = content.replace(wrapped[0], ""), wrapped[1]
    elif thought := _THOUGHT.search(content):
        before, body = thought[0], content.replace(thought[0], "")
    calls = json.loads(body)
    try:
        listed = calls if isinstance(calls, list) else [calls]
        return before, tuple(ToolCall(call["name"], call["arguments"]) for call in listed)
    except (KeyError, TypeError):
        raise ValueError("expected the keys name and arguments in each call") from None


def render_calls(calls: Sequence[ToolCall], style: ToolStyle) -> str:
    """Returns the text of `calls` in the style of a model family.

    Raises:
        ValueError: The style has no way to write several calls.
    """
    if style in ("default", "phi4"):
        return "\n".join(
            f"Action: {call.name}\nAction Input: {_json(call.arguments)}" for call in calls
        )
    if style == "glm4":
        if len(calls) > 1:
            raise ValueError(f"{len(calls)} calls in a turn; the tool format glm4 has one")
        return f"{calls[0].name}\n{_json(calls[0].arguments)}"
    key = "parameters" if style == "llama3" else "arguments"
    objects = [{"name": call.name, key: call.arguments} for call in calls]
    if style == "qwen":
        return "\n".join(f"<tool_call>\n{_json(item)}\n</tool_call>" for item in objects)
    if style == "llama3" and len(objects) == 1:
        return _json(objects[0])
    return _json(objects)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)

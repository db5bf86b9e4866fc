"""Parses the calls in a `function` turn and renders them in the style of a model family."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["TOOL_STYLES", "ToolCall", "ToolStyle", "parse_calls", "render_calls"]

ToolStyle = Literal[
    "default", "glm4", "glm4_moe", "ling", "llama3", "minimax1", "minimax2", "mistral", "phi4",
    "qwen", "qwen3_5", "seed_oss",
]  # fmt: skip
TOOL_STYLES: tuple[str, ...] = get_args(ToolStyle)

_WRAPPED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_XML: dict[ToolStyle, tuple[str, str, str]] = {
    "glm4_moe": ("\n<tool_call>%s", "\n<arg_key>%s</arg_key>\n<arg_value>%s</arg_value>", ""),
    "minimax2": ('<invoke name="%s">', '\n<parameter name="%s">%s</parameter>', "\n</invoke>"),
    "qwen3_5": (
        "<tool_call>\n<function=%s>",
        "\n<parameter=%s>\n%s\n</parameter>",
        "\n</function>\n</tool_call>",
    ),
    "seed_oss": (
        "\n<seed:tool_call>\n<function=%s",
        "\n<parameter=%s>%s</parameter>",
        "\n</function>\n</seed:tool_call>",
    ),
}
"""A call's begin, with the function's name; an argument, with its name and value; and the end.

They are LLaMA-Factory's, with the tags that it leaves out.
"""


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its JSON arguments."""

    name: str
    arguments: Any


def parse_calls(
    content: str, thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
) -> tuple[str, tuple[ToolCall, ...]]:
    """Splits a `function` turn into the text before its calls and the calls.

    Args:
        content: A JSON object with `name` and `arguments`, or a list of such objects. It may stand
            alone, follow a thought, or be inside `<tool_call>` tags that follow any text.
        thought: What begins and what ends a thought.

    Raises:
        ValueError: The calls are not JSON of this form.
    """
    before, body = "", content
    if wrapped := _WRAPPED_CALL.search(content):
        before, body = content.replace(wrapped[0], ""), wrapped[1]
    elif found := re.search(".*?".join(map(re.escape, thought)), content, re.DOTALL):
        before, body = found[0], content.replace(found[0], "")
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
    if form := _XML.get(style):
        return "\n".join(_write_xml(call, form) for call in calls)
    key = "parameters" if style == "llama3" else "arguments"
    objects = [{"name": call.name, key: call.arguments} for call in calls]
    if style == "minimax1":
        return "\n".join(["<tool_calls>", *map(_json, objects), "</tool_calls>"])
    if style in ("qwen", "ling"):
        return "\n".join(f"<tool_call>\n{_json(item)}\n</tool_call>" for item in objects)
    if style == "llama3" and len(objects) == 1:
        return _json(objects[0])
    return _json(objects)


def _write_xml(call: ToolCall, form: tuple[str, str, str]) -> str:
    start, argument, end = form
    if not isinstance(call.arguments, dict):
        raise ValueError(f"the arguments of {call.name} are not a JSON object")
    texts = (
        argument % (key, value if isinstance(value, str) else _json(value))
        for key, value in call.arguments.items()
    )
    return "".join([start % call.name, *texts, end])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)

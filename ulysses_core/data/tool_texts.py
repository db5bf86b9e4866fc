"""The text that tells a model which tools it has, in the style of a model family.

The texts are those of the families' chat templates; `default` and `glm4` are LLaMA-Factory's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ulysses_core.data.tool_calls import ToolStyle

__all__ = ["Tool", "join_observations", "parse_tools", "render_tools"]

Tool = dict[str, Any]
"""The JSON schema of a function: `name`, `description`, `parameters`."""

_DEFAULT = (
    "You have access to the following tools:\n%s"
    "Use the following format if using a tool:\n"
    "```\n"
    "Action: tool name (one of [%s])\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n'
    "```\n"
)
_GLM4 = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"  # noqa: RUF001 - its text
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具%s"
)
_GLM4_TOOL = "\n\n## %s\n\n%s\n在调用上述函数时，请使用 Json 格式表示调用的参数。"  # noqa: RUF001 - its text
# Llama 3.1's chat template has this date unless another one is given.
_LLAMA3 = (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "You have access to the following functions. To call a function, please respond with JSON for "
    'a function call. Respond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}. Do not use variables.\n\n%s"
)
_QWEN = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>%s"
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


def parse_tools(value: object) -> tuple[Tool, ...]:
    """Returns the functions of a `tools` column: JSON text, or the list itself.

    A function may be wrapped as OpenAI does, `{"type": "function", "function": {...}}`.

    Raises:
        ValueError: The value is not a JSON list of functions with names.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else []
    listed = value if isinstance(value, list) else [value]
    tools = tuple(_unwrap(tool) for tool in listed if tool is not None)
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise ValueError(f"tool {number} is not a JSON object with a name")
    return tools


def _unwrap(tool: Any) -> Any:
    is_wrapped = isinstance(tool, dict) and tool.get("type") == "function" and "function" in tool
    return tool["function"] if is_wrapped else tool


def render_tools(tools: Sequence[Tool], style: ToolStyle) -> str:
    """Returns the text about `tools` that follows the system text; empty without tools."""
    if not tools:
        return ""
    if style == "default":
        names = ", ".join(tool["name"] for tool in tools)
        return _DEFAULT % ("".join(map(_describe, tools)), names)
    if style == "glm4":
        bodies = (_GLM4_TOOL % (tool["name"], _json(tool, indent=4)) for tool in tools)
        return _GLM4 % "".join(bodies)
    if style == "phi4":
        return f"<|tool|>{_json(list(tools))}<|/tool|>"
    wrapped = [{"type": "function", "function": tool} for tool in tools]
    if style == "llama3":
        return _LLAMA3 % "".join(_json(tool, indent=4) + "\n\n" for tool in wrapped)
    if style == "mistral":
        return f"[AVAILABLE_TOOLS] {_json(wrapped)}[/AVAILABLE_TOOLS]"
    return _QWEN % "".join("\n" + _json(tool) for tool in wrapped)


def join_observations(results: Sequence[str], style: ToolStyle) -> str:
    """Returns the text of several results that answer the calls of one turn."""
    between = "\n</tool_response>\n<tool_response>\n" if style == "qwen" else "\n"
    return between.join(results)


def _describe(tool: Tool) -> str:
    parameters = tool.get("parameters") or {}
    required = parameters.get("required") or []
    lines = "".join(
        _describe_parameter(name, schema, name in required)
        for name, schema in (parameters.get("properties") or {}).items()
    )
    about = tool.get("description", "")
    return f"> Tool Name: {tool['name']}\nTool Description: {about}\nTool Args:\n{lines}\n"


def _describe_parameter(name: str, schema: dict[str, Any], is_required: bool) -> str:
    text = f"  - {name} ({schema.get('type', '')}{', required' if is_required else ''}): "
    text += str(schema.get("description", ""))
    if choices := schema.get("enum"):
        text += f", should be one of [{', '.join(map(str, choices))}]"
    if items := schema.get("items"):
        text += f", where each item should be {items.get('type', '')}"
    return text + "\n"


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""The text that tells a model which tools it has, in the style of a model family.

The texts are those of the families' chat templates, as LLaMA-Factory writes them; `default` and
`glm4` are LLaMA-Factory's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ulysses_core.data.tool_calls import ToolStyle

__all__ = ["Tool", "join_observations", "parse_tools", "render_tools", "wrap_tool"]

Tool = dict[str, Any]
"""The JSON schema of a function: `name`, `description`, `parameters`.

It may be wrapped as OpenAI does, `{"type": "function", "function": {...}}`.
"""

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
_SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>%s"
    "\n</tools>\n\nFor each function call, "
)
_LING = _SIGNATURES + (
    "return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_QWEN = "\n\n" + _LING
_GLM4_MOE = f"\n\n{_SIGNATURES}" + (
    "output the function name and arguments within the following XML format:"
    "\n<tool_call>{function-name}"
    "\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"
    "\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
)
_QWEN3_5 = (
    "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>%s\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n"
    "</parameter>\n<parameter=example_parameter_2>\nThis is the value for the second parameter\n"
    "that can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\n"
    "Reminder:\n- Function calls MUST follow the specified format: an inner <function=...>"
    "</function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the "
    "function call, but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current "
    "knowledge and do not tell the user about function calls\n</IMPORTANT>"
)
_SEED_OSS = (
    "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist "
    "with the user query.Tool List:\nYou are authorized to use the following tools (described in "
    "JSON Schema format). Before performing any task, you must decide how to call them based on "
    "the descriptions and parameters of these tools.\n%s\n工具调用请遵循如下格式:\n"
    "<seed:tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>value_1</parameter>\n"
    "<parameter=example_parameter_2>This is the value for the second parameter\nthat can span\n"
    "multiple lines</parameter>\n</function>\n</seed:tool_call>\n"
)
_MINIMAX1 = (
    "You are provided with these tools:\n<tools>\n%s</tools>\n\nIf you need to call tools, please "
    "respond with <tool_calls></tool_calls> XML tags, and provide tool-name and json-object of "
    "arguments, following the format below:\n<tool_calls>\n"
    '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
)
_MINIMAX2 = (
    "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
    "Here are the tools available in JSONSchema format:\n\n<tools>\n%s</tools>\n\n"
    "When making tool calls, use XML format to invoke tools and pass parameters:\n\n"
    '<minimax:tool_call>\n<invoke name="tool-name-1">\n'
    '<parameter name="param-key-1">param-value-1</parameter>\n'
    '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n'
    "</minimax:tool_call>"
)
_BETWEEN_RESULTS: dict[ToolStyle, str] = {
    **dict.fromkeys(("qwen", "qwen3_5", "ling"), "\n</tool_response>\n<tool_response>\n"),
    "minimax2": "</response>\n<response>",
}
"""What separates results in one turn, in styles whose observations have tags."""


def parse_tools(value: object) -> tuple[Tool, ...]:
    """Returns the functions of a `tools` column: JSON text, or the list itself.

    Raises:
        ValueError: The value is not a JSON list of functions with names.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else []
    listed: list[Any] = value if isinstance(value, list) else [value]
    tools = tuple(tool for tool in listed if tool is not None)
    for number, tool in enumerate(tools, start=1):
        function = _unwrap(tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} is not a JSON object with a name")
    return tools


def wrap_tool(tool: Tool) -> Tool:
    """Returns a function wrapped as OpenAI does."""
    return tool if _is_wrapped(tool) else {"type": "function", "function": tool}


def _unwrap(tool: Tool) -> Any:
    return tool["function"] if _is_wrapped(tool) else tool


def _is_wrapped(tool: Tool) -> bool:
    return tool.get("type") == "function" and "function" in tool


def render_tools(tools: Sequence[Tool], style: ToolStyle) -> str:
    """Returns the text about `tools` that follows the system text; empty without tools."""
    return _RENDER[style](tools) if tools else ""


def _render_default(tools: Sequence[Tool]) -> str:
    functions = [_unwrap(tool) for tool in tools]
    names = ", ".join(function["name"] for function in functions)
    return _DEFAULT % ("".join(map(_describe, functions)), names)


def _render_glm4(tools: Sequence[Tool]) -> str:
    functions = [_unwrap(tool) for tool in tools]
    return _GLM4 % "".join(_GLM4_TOOL % (each["name"], _json(each, indent=4)) for each in functions)


def _wrapped(text: str, form: str = "\n%s", indent: int | None = None) -> _Renderer:
    """Returns what puts wrapped functions, each in `form`, into `text`."""
    return lambda tools: text % "".join(form % _json(wrap_tool(tool), indent) for tool in tools)


def _plain(text: str, form: str) -> _Renderer:
    """Returns what puts functions that are not wrapped, each in `form`, into `text`."""
    return lambda tools: text % "".join(form % _json(_unwrap(tool)) for tool in tools)


_Renderer = Callable[[Sequence[Tool]], str]
_RENDER: dict[ToolStyle, _Renderer] = {
    "default": _render_default,
    "glm4": _render_glm4,
    "glm4_moe": _wrapped(_GLM4_MOE),
    "ling": _wrapped(_LING + "\ndetailed thinking off"),
    "llama3": _wrapped(_LLAMA3, "%s\n\n", indent=4),
    "minimax1": _plain(_MINIMAX1, "%s\n"),
    "minimax2": _plain(_MINIMAX2, "<tool>%s</tool>\n"),
    "mistral": lambda tools: (
        f"[AVAILABLE_TOOLS] {_json([wrap_tool(tool) for tool in tools])}[/AVAILABLE_TOOLS]"
    ),
    "phi4": lambda tools: f"<|tool|>{_json(list(tools))}<|/tool|>",  # as they are
    "qwen": _wrapped(_QWEN),
    "qwen3_5": _plain(_QWEN3_5, "\n%s"),
    "seed_oss": lambda tools: _SEED_OSS % _json(list(tools)),  # as they are
}


def join_observations(results: Sequence[str], style: ToolStyle) -> str:
    """Returns the text of several results that answer the calls of one turn."""
    return _BETWEEN_RESULTS.get(style, "\n").join(results)


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

"""Function calling: the tools column, OpenAI's calls, and how templates write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ulysses_core.data import DataConfig, load_datasets
from ulysses_core.data.messages import Example, Message
from ulysses_core.data.turns import encode_turns
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError

ADD = {
    "name": "add",
    "description": "Adds numbers.",
    "parameters": {
        "type": "object",
        "properties": {
            "x": {"type": "integer", "description": "A number."},
            "unit": {"type": "string", "description": "Its unit.", "enum": ["m", "ft"]},
            "more": {"type": "array", "description": "Others.", "items": {"type": "integer"}},
        },
        "required": ["x"],
    },
}
WRAPPED = {"type": "function", "function": ADD}
CALL = '{"name": "add", "arguments": {"x": 1}}'
CHAT = Example(
    "SYS",
    (
        Message("user", "Q1"),
        Message("function", CALL),
        Message("observation", "R1", ("R2",)),
        Message("assistant", "A2"),
    ),
    tools=(ADD,),
)
QWEN_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{json.dumps(WRAPPED)}\n</tools>\n\nFor each function call, return a json object with "
    "function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
DEFAULT_TOOLS = (
    "You have access to the following tools:\n"
    "> Tool Name: add\nTool Description: Adds numbers.\nTool Args:\n"
    "  - x (integer, required): A number.\n"
    "  - unit (string): Its unit., should be one of [m, ft]\n"
    "  - more (array): Others., where each item should be integer\n\n"
    "Use the following format if using a tool:\n```\n"
    "Action: tool name (one of [add])\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
)
CHATS = {"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}


def openai_row(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {
        "messages": [
            {"role": "system", "content": "SYS"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "1"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "R1"},
            {"role": "tool", "content": "R2"},
            {"role": "assistant", "content": "A2"},
        ],
        "tools": [WRAPPED],
    }


def texts(tokenizer: Any, template: str | None, example: Example, **options: Any) -> list[str]:
    turns = encode_turns(tokenizer, template, example, **options)
    return [tokenizer.decode(side) for turn in turns for side in turn]


def test_qwen_writes_tools_calls_and_results(tokenizer: PreTrainedTokenizerFast) -> None:
    assert texts(tokenizer, "qwen", CHAT) == [
        f"<|im_start|>system\nSYS{QWEN_TOOLS}<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        f"<tool_call>\n{CALL}\n</tool_call><|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "A2<|im_end|>\n",
    ]


@pytest.mark.parametrize(
    ("template", "start", "call", "result"),
    [
        (
            "default",
            f"System: SYS{DEFAULT_TOOLS}</s>\n",
            'Action: add\nAction Input: {"x": 1}',
            "R2",
        ),
        (
            "mistral",
            f"<s>[INST] SYS[AVAILABLE_TOOLS] {json.dumps([WRAPPED])}[/AVAILABLE_TOOLS]\n\nQ1",
            f"[TOOL_CALLS] [{CALL}]</s>",
            '[TOOL_RESULTS] {"content": R1\nR2}[/TOOL_RESULTS]',
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nSYSCutting Knowledge Date: December "
            "2023\nToday Date: 26 Jul 2024\n\nYou have access to the following functions.",
            '{"name": "add", "parameters": {"x": 1}}<|eot_id|>',
            "<|start_header_id|>ipython<|end_header_id|>\n\nR1\nR2<|eot_id|>",
        ),
        ("glm4", "[gMASK]<sop><|system|>\nSYS你是一个名为", 'add\n{"x": 1}', "<|observation|>\nR1"),
        (
            "phi4_mini",
            f"<|system|>SYS<|tool|>{json.dumps([ADD])}<|/tool|><|end|>",
            "Action: add",
            "R1",
        ),
    ],
)
def test_a_template_writes_tools_in_the_way_of_its_family(
    tokenizer: PreTrainedTokenizerFast, template: str, start: str, call: str, result: str
) -> None:
    prompt, answer, observation, _ = texts(tokenizer, template, CHAT)
    assert prompt.startswith(start)
    assert answer.startswith(call)
    assert result in observation


ARGUMENTS = {"x": 1, "unit": "m", "more": [1, {"y": None}]}
TWO_CALLS = json.dumps([{"name": "add", "arguments": ARGUMENTS}, json.loads(CALL)])
MANY = replace(
    CHAT, messages=(CHAT.messages[0], Message("function", TWO_CALLS), *CHAT.messages[2:])
)
MORE = json.dumps(ARGUMENTS["more"])
FORMS: dict[str, tuple[str, str, str, str]] = {
    "glm4_moe": (
        f"<tools>\n{json.dumps(WRAPPED)}\n</tools>\n\nFor each function call, output the function "
        "name and arguments within the following XML format:\n<tool_call>{function-name}\n",
        "...\n</tool_call>\n<|user|>",
        "\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>unit</arg_key>\n"
        f"<arg_value>m</arg_value>\n<arg_key>more</arg_key>\n<arg_value>{MORE}</arg_value>\n\n"
        "<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>",
        "<|observation|>\nR1\nR2<|assistant|>",
    ),
    "qwen3_5": (
        f"You have access to the following functions:\n\n<tools>\n{json.dumps(ADD)}\n</tools>\n\n",
        "</IMPORTANT><|im_end|>\n",
        "<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n<parameter=unit>\nm\n"
        f"</parameter>\n<parameter=more>\n{MORE}\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>\n",
        "<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n</tool_response><|im_end|>",
    ),
    "seed_oss": (
        "You are Doubao, a helpful AI assistant. You may call one or more functions to assist with "
        "the user query.Tool List:\nYou are authorized to use",
        f"these tools.\n{json.dumps([ADD])}\n工具调用请遵循如下格式:\n<seed:tool_call>\n",
        "<s>\n\n<seed:tool_call>\n<function=add\n<parameter=x>1</parameter>\n"
        f"<parameter=unit>m</parameter>\n<parameter=more>{MORE}</parameter>\n</function>\n"
        "</seed:tool_call>\n\n<seed:tool_call>\n<function=add\n<parameter=x>1</parameter>\n"
        "</function>\n</seed:tool_call></s>",
        "<s>user\nR1\nR2</s><s>assistant\n",
    ),
    "bailing_v2": (
        "SYS# Tools\n\nYou may call one or more functions",
        f"\n{json.dumps(WRAPPED)}\n</tools>\n\nFor each function call, return a json object",
        f'<tool_call>\n{{"name": "add", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>\n'
        f"<tool_call>\n{CALL}\n</tool_call><|role_end|>",
        "<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n</tool_response><|role_end|>",
    ),
    "minimax1": (
        f"SYSYou are provided with these tools:\n<tools>\n{json.dumps(ADD)}\n</tools>\n\n",
        '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>',
        f'<tool_calls>\n{{"name": "add", "arguments": {json.dumps(ARGUMENTS)}}}\n{CALL}\n'
        "</tool_calls><end_of_sentence>\n",
        "tool name=tools\nR1\nR2<end_of_sentence>",
    ),
    "minimax2": (
        f"JSONSchema format:\n\n<tools>\n<tool>{json.dumps(ADD)}</tool>\n</tools>\n\n",
        "...\n</invoke>\n</minimax:tool_call>[e~[\n",
        '<invoke name="add">\n<parameter name="x">1</parameter>\n<parameter name="unit">m'
        f'</parameter>\n<parameter name="more">{MORE}</parameter>\n</invoke>\n'
        '<invoke name="add">\n<parameter name="x">1</parameter>\n</invoke>[e~[\n',
        "]~b]tool\n<response>R1</response>\n<response>R2</response>[e~[\n",
    ),
}
"""Two parts of the first prompt, the calls, and a part of the results."""


@pytest.mark.parametrize("name", FORMS)
def test_a_template_writes_several_calls_and_results(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    first, second, calls, results = FORMS[name]
    prompt, answer, observation, _ = texts(tokenizer, name, MANY)
    assert first in prompt
    assert second in prompt
    assert (
        answer.removeprefix("<think>\n\n</think>\n\n").removeprefix("<seed:think></seed:think>")
        == calls
    )
    assert results in observation


def test_calls_may_follow_a_thought_in_the_templates_own_words(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    thought = "<seed:think>hm</seed:think>"
    example = replace(CHAT, messages=(CHAT.messages[0], Message("function", thought + CALL)))
    _, answer = texts(tokenizer, "seed_oss", example)
    assert answer.startswith(f"<s>\n{thought}\n<seed:tool_call>\n<function=add")


@pytest.mark.parametrize("name", ["seed_oss", "phi4_mini", "qwen3_5", "qwen", "default"])
def test_tools_may_be_wrapped(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    wrapped, plain = (
        texts(tokenizer, name, replace(CHAT, tools=(tool,))) for tool in (WRAPPED, ADD)
    )
    if name in ("seed_oss", "phi4_mini"):  # which show them as they are
        assert json.dumps([WRAPPED]) in wrapped[0]
    else:
        assert wrapped == plain


def test_arguments_that_are_not_an_object_are_refused_where_each_is_written(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = Message("function", '{"name": "add", "arguments": "x"}')
    example = replace(CHAT, messages=(CHAT.messages[0], call), where="f, row 3")
    with pytest.raises(InputError, match="f, row 3: the arguments of add are not a JSON object"):
        texts(tokenizer, "qwen3_5", example)


def test_tool_format_replaces_the_templates_own_way(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, answer, *_ = texts(tokenizer, "chatml", CHAT, tool_format="qwen")
    assert QWEN_TOOLS in prompt
    assert answer == f"<tool_call>\n{CALL}\n</tool_call></s>"


def test_calls_that_a_format_cannot_write_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    two = Message("function", f"[{CALL}, {CALL}]")
    example = replace(CHAT, messages=(CHAT.messages[0], two), where="f, row 3")
    with pytest.raises(InputError, match="f, row 3: 2 calls in a turn; the tool format glm4 has"):
        texts(tokenizer, "glm4", example)


def test_the_tokenizers_own_template_gets_tools_and_each_result(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% for m in messages %}"
        "[{{ m.role }}]{{ m.tool_calls[0].function.arguments | tojson if m.tool_calls else "
        "m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert texts(tokenizer, None, CHAT) == [
        "add [system]SYS[user]Q1[assistant]",
        '{"x": 1}',
        "[tool]R1[tool]R2[assistant]",
        "A2",
    ]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'], ids=["object", "text"])
def test_openai_rows_give_the_same_conversation(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, arguments: Any
) -> None:
    folder = write_dataset([openai_row(arguments)], **CHATS)
    config = DataConfig(dataset="toy", dataset_dir=folder, template="qwen")
    [row] = load_datasets(config, find_stage("sft"), tokenizer).train
    assert tokenizer.decode(row["input_ids"]) == "".join(texts(tokenizer, "qwen", CHAT))


def test_text_before_openai_calls_is_kept(
    write_dataset: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = openai_row({"x": 1})
    row["messages"][2]["content"] = "I add. "
    config = DataConfig(dataset="toy", dataset_dir=write_dataset([row], **CHATS), template="qwen")
    [row] = load_datasets(config, find_stage("sft"), tokenizer).train
    assert "I add. <tool_call>" in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "{"}, "column 'tools' (tools) is not a JSON list of functions"),
        ({"tools": [{"x": 1}]}, "column 'tools' (tools) is not a JSON list of functions: tool 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "turn 1 has a part of type image_url; allowed: text",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "turn 1: tool_calls is not a list of function calls",
        ),
    ],
)
def test_the_error_about_a_wrong_call_names_the_row(
    write_dataset: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    change: dict[str, Any],
    message: str,
) -> None:
    folder = write_dataset([openai_row({}) | change], **CHATS)
    config = DataConfig(dataset="toy", dataset_dir=folder, template="qwen")
    with pytest.raises(InputError) as caught:
        load_datasets(config, find_stage("sft"), tokenizer)
    assert f"row 1: {message}" in str(caught.value)

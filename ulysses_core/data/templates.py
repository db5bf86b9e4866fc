"""Chat templates by name, with the texts of LLaMA-Factory's templates of the same names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ulysses_core.data.tool_calls import ToolStyle
from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["TEMPLATES", "Template", "get_template"]


@dataclass(frozen=True, kw_only=True)
class Template:
    """How to write each turn. `{content}` is the turn's text; `{bos}` and `{eos}` are tokens."""

    user: str
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    observation: str | None = None
    """None writes observations as user turns."""
    function: str | None = None
    """None writes function calls as assistant turns."""
    prefix: str = ""
    """Text at the start of every conversation."""
    default_system: str = ""
    system_in_user: bool = False
    """Whether the system text goes inside the first user turn; otherwise it goes before it."""
    tool_style: ToolStyle = "default"
    has_thoughts: bool = False
    """Whether answers begin with a `<think>` block; one without it gets an empty block."""
    stop: str | None = None
    """Text that ends an answer and should be a single token of the tokenizer."""


_CHATML = Template(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    observation="<|im_start|>tool\n{content}<|im_end|>\n<|im_start|>assistant\n",
    stop="<|im_end|>",
)
_QWEN = replace(
    _CHATML,
    observation=(
        "<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    tool_style="qwen",
)

TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        user="### Instruction:\n{content}\n\n### Response:\n",
        assistant="{content}{eos}\n\n",
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        ),
    ),
    "chatml": _CHATML,
    "default": Template(
        user="Human: {content}{eos}\nAssistant:",
        assistant="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "empty": Template(user="{content}", assistant="{content}"),
    "gemma": Template(
        user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        assistant="{content}<end_of_turn>\n",
        system="{content}\n\n",
        observation="<start_of_turn>tool\n{content}<end_of_turn>\n<start_of_turn>model\n",
        prefix="{bos}",
        system_in_user=True,
        stop="<end_of_turn>",
    ),
    "llama2": Template(
        user="{bos}[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
    ),
    "llama3": Template(
        user=(
            "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        assistant="{content}<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        observation=(
            "<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        prefix="{bos}",
        tool_style="llama3",
        stop="<|eot_id|>",
    ),
    "mistral": Template(
        user="[INST] {content}[/INST]",
        assistant=" {content}{eos}",
        system="{content}\n\n",
        observation='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
        function="[TOOL_CALLS] {content}{eos}",
        prefix="{bos}",
        system_in_user=True,
        tool_style="mistral",
    ),
    "olmo": Template(user="<|user|>\n{content}<|assistant|>\n", prefix="{eos}"),
    "phi": Template(
        user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
        assistant="{content}<|end|>\n",
        system="<|system|>\n{content}<|end|>\n",
        stop="<|end|>",
    ),
    "qwen": replace(
        _QWEN,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": replace(_QWEN, has_thoughts=True),
    "qwen3_nothink": _QWEN,
    "vicuna": Template(
        user="USER: {content} ASSISTANT:",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "zephyr": Template(
        user="<|user|>\n{content}{eos}<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}


def get_template(name: str) -> Template:
    """Returns the template called `name`.

    Raises:
        InputError: There is no such template.
    """
    if name not in TEMPLATES:
        raise InputError(
            f"template is {name!r}{nearest(name, TEMPLATES)}; allowed: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]

"""Chat templates by name, with the texts of LLaMA-Factory's templates of the same names."""

from __future__ import annotations

from dataclasses import replace

from ulysses_core.data.template import Template
from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["TEMPLATES", "get_template"]


_CHATML = Template(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    observation="<|im_start|>tool\n{content}<|im_end|>\n<|im_start|>assistant\n",
    stop="<|im_end|>",
)
_CHATML_PLAIN = replace(_CHATML, observation=None)
_QWEN = replace(
    _CHATML,
    observation=(
        "<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    tool_style="qwen",
)
_DEEPSEEK3 = Template(user="<｜User｜>{content}<｜Assistant｜>", prefix="{bos}")  # noqa: RUF001 - its tokens
_GEMMA = Template(
    user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{content}<end_of_turn>\n",
    system="{content}\n\n",
    observation="<start_of_turn>tool\n{content}<end_of_turn>\n<start_of_turn>model\n",
    prefix="{bos}",
    system_in_user=True,
    stop="<end_of_turn>",
)
_GLM4 = Template(
    user="<|user|>\n{content}<|assistant|>",
    assistant="\n{content}",
    system="<|system|>\n{content}",
    observation="<|observation|>\n{content}<|assistant|>",
    function="{content}",
    prefix="[gMASK]<sop>",
    tool_style="glm4",
    ends_with_eos=True,
)
_QWEN3_5 = replace(_QWEN, tool_style="qwen3_5")
_GRANITE3 = Template(
    user=(
        "<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    ),
    assistant="{content}<|end_of_text|>\n",
    system="<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
    stop="<|end_of_text|>",
)
_LLAMA2 = Template(
    user="{bos}[INST] {content} [/INST]",
    system="<<SYS>>\n{content}\n<</SYS>>\n\n",
    system_in_user=True,
)


def _llama3(start: str, end: str, stop: str) -> Template:
    """Returns Llama 3's template with other texts around a role and after a turn."""
    answer = f"{start}assistant{end}\n\n"
    return Template(
        user=f"{start}user{end}\n\n{{content}}{stop}{answer}",
        assistant=f"{{content}}{stop}",
        system=f"{start}system{end}\n\n{{content}}{stop}",
        observation=f"{start}ipython{end}\n\n{{content}}{stop}{answer}",
        prefix="{bos}",
        tool_style="llama3",
        stop=stop,
    )


_MINISTRAL = Template(
    user="[INST]{content}[/INST]",
    system="{content}\n\n",
    observation='[TOOL_RESULTS]{"content": {content}}[/TOOL_RESULTS]',
    function="[TOOL_CALLS]{content}{eos}",
    prefix="{bos}",
    system_in_user=True,
    tool_style="mistral",
)
_PHI = Template(
    user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
    assistant="{content}<|end|>\n",
    system="<|system|>\n{content}<|end|>\n",
    stop="<|end|>",
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
    "bailing_v2": Template(
        user="<role>HUMAN</role>{content}<|role_end|><role>ASSISTANT</role>",
        assistant="{content}<|role_end|>",
        system="<role>SYSTEM</role>{content}<|role_end|>",
        observation=(
            "<role>OBSERVATION</role>\n<tool_response>\n{content}\n</tool_response><|role_end|>"
            "<role>ASSISTANT</role>"
        ),
        tool_style="ling",
        ends_with_eos=True,
    ),
    "chatml": _CHATML,
    "chatml_de": replace(
        _CHATML, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."
    ),
    "cohere": Template(
        user=(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        prefix="{bos}",
    ),
    "deepseek": Template(
        user="User: {content}\n\nAssistant:", system="{content}\n\n", prefix="{bos}"
    ),
    "deepseek3": _DEEPSEEK3,
    "deepseekr1": replace(_DEEPSEEK3, has_thoughts=True),
    "default": Template(
        user="Human: {content}{eos}\nAssistant:",
        assistant="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "empty": Template(user="{content}", assistant="{content}"),
    "exaone": Template(
        user="[|user|]{content}\n[|assistant|]",
        assistant="{content}{eos}\n",
        system="[|system|]{content}[|endofturn|]\n",
    ),
    "falcon": Template(
        user="User: {content}\nFalcon:", assistant="{content}\n", ends_with_eos=True
    ),
    "fewshot": Template(user="{content}", assistant="{content}\n\n", ends_with_eos=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, ends_with_eos=True),
    "gemma3": _GEMMA,
    "glm4": _GLM4,
    "glm4_moe": replace(_GLM4, tool_style="glm4_moe", has_thoughts=True),
    "glmz1": replace(_GLM4, has_thoughts=True),
    "gpt_oss": Template(
        user="<|start|>user<|message|>{content}<|end|><|start|>assistant",
        assistant="{content}",
        system="<|start|>system<|message|>{content}<|end|>",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        has_thoughts=True,
        thought=(
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ends_with_eos=True,
    ),
    "granite3": _GRANITE3,
    "granite4": replace(
        _GRANITE3,
        observation=(
            "<|start_of_role|>tool<|end_of_role|>{content}<|end_of_text|>\n"
            "<|start_of_role|>assistant\n"
        ),
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
    ),
    "llama2": _LLAMA2,
    "llama3": _llama3("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": _llama3("<|header_start|>", "<|header_end|>", "<|eot|>"),
    "mimo": replace(_QWEN, default_system="You are a helpful assistant.", has_thoughts=True),
    "minimax1": Template(
        user=(
            "<beginning_of_sentence>user name=user\n{content}<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n"
        ),
        assistant="{content}<end_of_sentence>\n",
        system=("<beginning_of_sentence>system ai_setting=assistant\n{content}<end_of_sentence>\n"),
        observation=(
            "<beginning_of_sentence>tool name=tools\n{content}<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n"
        ),
        default_system="You are a helpful assistant.",
        tool_style="minimax1",
        stop="<end_of_sentence>",
    ),
    "minimax2": Template(
        user="]~b]user\n{content}[e~[\n]~b]ai\n",
        assistant="{content}[e~[\n",
        system="]~!b[]~b]system\n{content}[e~[\n",
        observation="]~b]tool\n<response>{content}</response>[e~[\n]~b]ai\n",
        default_system=(
            "You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax."
        ),
        tool_style="minimax2",
        has_thoughts=True,
        stop="[e~[",
    ),
    "ministral": _MINISTRAL,
    "mistral": replace(
        _MINISTRAL,
        user="[INST] {content}[/INST]",
        assistant=" {content}{eos}",
        observation='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
        function="[TOOL_CALLS] {content}{eos}",
    ),
    "mistral_small": replace(
        _MINISTRAL, system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", system_in_user=False
    ),
    "olmo": Template(user="<|user|>\n{content}<|assistant|>\n", prefix="{eos}"),
    "phi": _PHI,
    "phi4": Template(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
        stop="<|im_end|>",
    ),
    "phi4_mini": Template(
        user="<|user|>{content}<|end|><|assistant|>",
        assistant="{content}<|end|>",
        system="<|system|>{content}<|end|>",
        tool_style="phi4",
        stop="<|end|>",
    ),
    "qwen": replace(
        _QWEN,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": replace(_QWEN, has_thoughts=True),
    "qwen3_5": replace(_QWEN3_5, has_thoughts=True),
    "qwen3_5_nothink": _QWEN3_5,
    "qwen3_6": replace(_QWEN3_5, has_thoughts=True),
    "qwen3_nothink": _QWEN,
    "seed_oss": Template(
        user="{bos}user\n{content}{eos}{bos}assistant\n",
        system="{bos}system\n{content}{eos}",
        function="{bos}\n{content}{eos}",
        tool_style="seed_oss",
        has_thoughts=True,
        thought=("<seed:think>", "</seed:think>"),
    ),
    "smollm": _CHATML_PLAIN,
    "smollm2": replace(
        _CHATML_PLAIN,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
    ),
    "solar": Template(
        user="### User:\n{content}\n\n### Assistant:\n",
        assistant="{content}",
        system="### System:\n{content}\n\n",
        ends_with_eos=True,
    ),
    "starchat": replace(_PHI, user="<|user|>\n{content}<|end|>\n<|assistant|>"),
    "vicuna": Template(
        user="USER: {content} ASSISTANT:",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "yi": _CHATML_PLAIN,
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

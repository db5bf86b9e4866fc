import logging
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from tests.core.data.published_templates import PUBLISHED
from ulysses_core.data import DataConfig
from ulysses_core.data.examples import Example, Message
from ulysses_core.data.templates import TEMPLATES, get_template
from ulysses_core.data.thoughts import Thinking
from ulysses_core.data.tokenize import tokenize_sft
from ulysses_core.data.turns import encode_batch, encode_turns
from ulysses_monitor.common.errors import InputError

CHAT = Example(
    "SYS",
    (
        Message("user", "Q1"),
        Message("assistant", "A1"),
        Message("user", "Q2"),
        Message("assistant", "A2"),
    ),
)
CALL = Example(
    "",
    (
        Message("user", "Q1"),
        Message("function", '{"name": "add", "arguments": {"x": 1}}'),
        Message("observation", "R1"),
        Message("assistant", "A2"),
    ),
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GPT_OSS_THOUGHT = (
    "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
)
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
QWEN_CHAT = [
    "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "A1<|im_end|>\n",
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
    "A2<|im_end|>\n",
]
THINKING_QWEN_CHAT = [f"{EMPTY_THOUGHT}{text}" if text[0] == "A" else text for text in QWEN_CHAT]
GLM_CHAT = [
    "[gMASK]<sop><|system|>\nSYS<|user|>\nQ1<|assistant|>",
    f"{EMPTY_THOUGHT}\nA1",
    "<|user|>\nQ2<|assistant|>",
    f"{EMPTY_THOUGHT}\nA2",
]
# The texts of prompt, answer, prompt, answer. <s> and </s> are the tokenizer's control tokens.
CHAT_TEXTS = {
    "alpaca": [
        "SYS### Instruction:\nQ1\n\n### Response:\n",
        "A1</s>\n\n",
        "### Instruction:\nQ2\n\n### Response:\n",
        "A2</s>\n\n",
    ],
    "bailing_v2": [
        "<role>SYSTEM</role>SYS<|role_end|><role>HUMAN</role>Q1<|role_end|><role>ASSISTANT</role>",
        "A1<|role_end|>",
        "<role>HUMAN</role>Q2<|role_end|><role>ASSISTANT</role>",
        "A2<|role_end|>",
    ],
    "chatml": QWEN_CHAT,
    "chatml_de": QWEN_CHAT,
    "default": [
        "System: SYS</s>\nHuman: Q1</s>\nAssistant:",
        "A1</s>\n",
        "Human: Q2</s>\nAssistant:",
        "A2</s>\n",
    ],
    "empty": ["SYSQ1", "A1", "Q2", "A2"],
    "exaone": [
        "[|system|]SYS[|endofturn|]\n[|user|]Q1\n[|assistant|]",
        "A1</s>\n",
        "[|user|]Q2\n[|assistant|]",
        "A2</s>\n",
    ],
    "falcon": ["SYSUser: Q1\nFalcon:", "A1\n", "User: Q2\nFalcon:", "A2\n"],
    "fewshot": ["SYSQ1", "A1\n\n", "Q2", "A2\n\n"],
    "glm4_moe": GLM_CHAT,
    "glmz1": GLM_CHAT,
    "minimax1": [
        "<beginning_of_sentence>system ai_setting=assistant\nSYS<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nQ1<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n",
        "A1<end_of_sentence>\n",
        "<beginning_of_sentence>user name=user\nQ2<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n",
        "A2<end_of_sentence>\n",
    ],
    "minimax2": [
        "]~!b[]~b]system\nSYS[e~[\n]~b]user\nQ1[e~[\n]~b]ai\n",
        f"{EMPTY_THOUGHT}A1[e~[\n",
        "]~b]user\nQ2[e~[\n]~b]ai\n",
        f"{EMPTY_THOUGHT}A2[e~[\n",
    ],
    "qwen3_5_nothink": QWEN_CHAT,
    "qwen3_5": THINKING_QWEN_CHAT,
    "qwen3_6": THINKING_QWEN_CHAT,
    "seed_oss": [
        "<s>system\nSYS</s><s>user\nQ1</s><s>assistant\n",
        "<seed:think></seed:think>A1</s>",
        "<s>user\nQ2</s><s>assistant\n",
        "<seed:think></seed:think>A2</s>",
    ],
    "gpt_oss": [
        "<|start|>system<|message|>SYS<|end|><|start|>user<|message|>Q1<|end|><|start|>assistant",
        f"{GPT_OSS_THOUGHT}A1",
        "<|start|>user<|message|>Q2<|end|><|start|>assistant",
        f"{GPT_OSS_THOUGHT}A2",
    ],
    "granite4": [
        "<|start_of_role|>system<|end_of_role|>SYS<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Q1<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "A1<|end_of_text|>\n",
        "<|start_of_role|>user<|end_of_role|>Q2<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "A2<|end_of_text|>\n",
    ],
    "mimo": [
        QWEN_CHAT[0],
        "<think>\n\n</think>\n\nA1<|im_end|>\n",
        QWEN_CHAT[2],
        "<think>\n\n</think>\n\nA2<|im_end|>\n",
    ],
    "ministral": ["<s>[INST]SYS\n\nQ1[/INST]", "A1</s>", "[INST]Q2[/INST]", "A2</s>"],
    "smollm": QWEN_CHAT,
    "solar": [
        "### System:\nSYS\n\n### User:\nQ1\n\n### Assistant:\n",
        "A1",
        "### User:\nQ2\n\n### Assistant:\n",
        "A2",
    ],
    "starchat": [
        "<|system|>\nSYS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>",
        "A1<|end|>\n",
        "<|user|>\nQ2<|end|>\n<|assistant|>",
        "A2<|end|>\n",
    ],
    "gemma": [
        "<s><start_of_turn>user\nSYS\n\nQ1<end_of_turn>\n<start_of_turn>model\n",
        "A1<end_of_turn>\n",
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n",
        "A2<end_of_turn>\n",
    ],
    "llama2": [
        "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nQ1 [/INST]",
        "A1</s>",
        "<s>[INST] Q2 [/INST]",
        "A2</s>",
    ],
    "llama3": [
        "<s><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A1<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A2<|eot_id|>",
    ],
    "mistral": ["<s>[INST] SYS\n\nQ1[/INST]", " A1</s>", "[INST] Q2[/INST]", " A2</s>"],
    "olmo": [
        "</s>SYS<|user|>\nQ1<|assistant|>\n",
        "A1</s>",
        "<|user|>\nQ2<|assistant|>\n",
        "A2</s>",
    ],
    "phi": [
        "<|system|>\nSYS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n",
        "A1<|end|>\n",
        "<|user|>\nQ2<|end|>\n<|assistant|>\n",
        "A2<|end|>\n",
    ],
    "qwen": QWEN_CHAT,
    "qwen3": [
        QWEN_CHAT[0],
        "<think>\n\n</think>\n\nA1<|im_end|>\n",
        QWEN_CHAT[2],
        "<think>\n\n</think>\n\nA2<|im_end|>\n",
    ],
    "qwen3_nothink": QWEN_CHAT,
    "vicuna": ["SYSUSER: Q1 ASSISTANT:", "A1</s>", "USER: Q2 ASSISTANT:", "A2</s>"],
    "zephyr": [
        "<|system|>\nSYS</s><|user|>\nQ1</s><|assistant|>\n",
        "A1</s>",
        "<|user|>\nQ2</s><|assistant|>\n",
        "A2</s>",
    ],
}
CALL_TEXTS = {
    "chatml": [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        'Action: add\nAction Input: {"x": 1}<|im_end|>\n',
        "<|im_start|>tool\nR1<|im_end|>\n<|im_start|>assistant\n",
        "A2<|im_end|>\n",
    ],
    "gemma": [
        "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n",
        'Action: add\nAction Input: {"x": 1}<end_of_turn>\n',
        "<start_of_turn>tool\nR1<end_of_turn>\n<start_of_turn>model\n",
        "A2<end_of_turn>\n",
    ],
    "llama3": [
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        '{"name": "add", "parameters": {"x": 1}}<|eot_id|>',
        "<|start_header_id|>ipython<|end_header_id|>\n\nR1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A2<|eot_id|>",
    ],
    "mistral": [
        "<s>[INST] Q1[/INST]",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}}]</s>',
        '[TOOL_RESULTS] {"content": R1}[/TOOL_RESULTS]',
        " A2</s>",
    ],
    "qwen3_nothink": [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        f"{QWEN_CALL}<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nR1\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
        "A2<|im_end|>\n",
    ],
    "zephyr": [
        "<|system|>\nYou are Zephyr, a helpful assistant.</s><|user|>\nQ1</s><|assistant|>\n",
        'Action: add\nAction Input: {"x": 1}</s>',
        "<|user|>\nR1</s><|assistant|>\n",
        "A2</s>",
    ],
}


def texts(
    tokenizer: PreTrainedTokenizerFast, template: str | None, example: Example, **settings: object
) -> list[str]:
    turns = encode_turns(tokenizer, template, example, **settings)  # type: ignore[arg-type]
    return [tokenizer.decode(side) for turn in turns for side in turn]


def test_every_template_has_an_expected_text() -> None:
    assert set(CHAT_TEXTS) | set(PUBLISHED) == set(TEMPLATES)


@pytest.mark.parametrize("name", CHAT_TEXTS)
def test_a_chat_is_rendered_with_the_template(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    assert texts(tokenizer, name, CHAT) == CHAT_TEXTS[name]


@pytest.mark.parametrize("name", CALL_TEXTS)
def test_calls_and_their_results_are_rendered_with_the_template(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    assert texts(tokenizer, name, CALL) == CALL_TEXTS[name]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("alpaca", f"{ALPACA_SYSTEM}### Instruction:"),
        ("default", "Human: Q1"),
        ("qwen", "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful"),
        ("qwen3", "<|im_start|>user\nQ1"),
        ("vicuna", f"{VICUNA_SYSTEM}USER: Q1"),
        ("llama2", "<s>[INST] Q1"),
    ],
)
def test_a_chat_without_a_system_text_gets_the_templates_own(
    tokenizer: PreTrainedTokenizerFast, name: str, start: str
) -> None:
    assert texts(tokenizer, name, replace(CHAT, system=""))[0].startswith(start)


def test_default_system_replaces_the_templates_own(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = replace(CHAT, system="")
    assert texts(tokenizer, "vicuna", bare, default_system="Be brief. ")[0].startswith("Be brief. ")
    assert texts(tokenizer, "vicuna", bare, default_system="")[0] == "USER: Q1 ASSISTANT:"
    assert texts(tokenizer, "vicuna", CHAT, default_system="Be brief.")[0].startswith("SYSUSER")


def test_control_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, answer = encode_turns(tokenizer, "default", replace(CHAT, system=""))[0]
    assert prompt.count(tokenizer.eos_token_id) == 1
    assert answer.count(tokenizer.eos_token_id) == 1


def test_placeholders_in_content_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example("{content}", (Message("user", "{eos}{content}"), Message("assistant", "{")))
    assert texts(tokenizer, "zephyr", example) == [
        "<|system|>\n{content}</s><|user|>\n{eos}{content}</s><|assistant|>\n",
        "{</s>",
    ]


def test_an_answer_with_a_thought_gets_no_second_one(tokenizer: PreTrainedTokenizerFast) -> None:
    thought = "<think>\nhm\n</think>\n\nA1"
    example = Example("", (Message("user", "Q1"), Message("assistant", thought)))
    assert texts(tokenizer, "qwen3", example)[1] == f"{thought}<|im_end|>\n"


def test_earlier_thoughts_are_removed_when_only_the_last_answer_is_trained_on(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first = Message("assistant", "<think>\nhm\n</think>\n\nA1")
    example = Example("", (CHAT.messages[0], first, *CHAT.messages[2:]))
    thinking = Thinking(keeps_history=False, fills_history=False)
    answers = texts(tokenizer, "qwen3", example, thinking=thinking)[1::2]
    assert answers == ["A1<|im_end|>\n", "<think>\n\n</think>\n\nA2<|im_end|>\n"]


def test_text_before_a_call_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    call = '{"name": "add", "arguments": {"x": 1}}'
    for before, content in (
        ("I add. ", f"I add. <tool_call>{call}</tool_call>"),
        ("<think>\nhm\n</think>\n\n", f"<think>\nhm\n</think>\n\n{call}"),
    ):
        example = Example("", (Message("user", "Q1"), Message("function", content)))
        answer = texts(tokenizer, "qwen3_nothink", example)[1]
        assert answer == f"{before}{QWEN_CALL}<|im_end|>\n"


def test_the_error_about_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"is 'lama3' \(did you mean 'llama3'\?\); allowed: alp"):
        get_template("lama3")


def test_a_template_with_eos_refuses_a_tokenizer_without_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="template 'default' needs an end-of-sequence token"):
        encode_turns(tokenizer, None, CHAT)
    assert texts(tokenizer, "chatml", CHAT) == CHAT_TEXTS["chatml"]


def test_a_stop_text_that_is_not_a_single_token_gives_a_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize_sft([CHAT], tokenizer, DataConfig(template="chatml"))
        assert not caplog.records
        tokenize_sft([CHAT], tokenizer, DataConfig(template="llama3"))
    assert "<|eot_id|>" in caplog.text


def test_a_batch_equals_its_conversations_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    single = [encode_turns(tokenizer, "qwen", example) for example in (CHAT, CALL)]
    assert encode_batch(tokenizer, "qwen", [CHAT, CALL]) == single


OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] "
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_without_a_name_the_tokenizers_own_template_is_used(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = OWN
    expected = ["<s>[system] SYS\n[user] Q1\n[assistant] ", "A1</s>\n"]
    expected += ["[user] Q2\n[assistant] ", "A2</s>\n"]
    assert texts(tokenizer, None, CHAT) == expected
    assert texts(tokenizer, None, CALL) == [
        "<s>[user] Q1\n[assistant] ",
        '{"name": "add", "arguments": {"x": 1}}</s>\n',
        "[tool] R1\n[assistant] ",
        "A2</s>\n",
    ]
    named = texts(tokenizer, None, CALL, default_system="Be brief.")[0]
    assert named == "<s>[system] Be brief.\n[user] Q1\n[assistant] "


def test_without_a_name_and_a_template_of_the_tokenizer_default_is_used(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert texts(tokenizer, None, CHAT) == CHAT_TEXTS["default"]


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + OWN
    with pytest.raises(InputError, match=r"cannot be split at turn 2.*set template to"):
        encode_turns(tokenizer, None, replace(CHAT, system=""))


def test_the_error_about_a_chat_template_that_rejects_a_conversation_says_why(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"toy.json, row 3: .*no system role.*set template to"):
        encode_turns(tokenizer, None, replace(CHAT, where="toy.json, row 3"))

"""The named templates give the same text as the chat templates that the families publish."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.core.data.published_templates import PUBLISHED
from ulysses_core.data import DataConfig
from ulysses_core.data.messages import Example, Message
from ulysses_core.data.templates import TEMPLATES
from ulysses_core.data.thoughts import Thinking
from ulysses_core.data.tokenize import tokenize_sft
from ulysses_core.data.turns import encode_turns

CHAT = Example(
    "Be brief.",
    (
        Message("user", "How far is it?"),
        Message("assistant", "Ten miles."),
        Message("user", "To where?"),
        Message("assistant", "To the sea."),
    ),
)
WITHOUT_SYSTEM = {"gemma", "gemma2", "mistral", "olmo"}
"""Families whose published template has no place for a system text, or another one."""
ANSWER_ENDS_LATER = {"gemma2": "</s>", "glm4": "</s>"}
"""Families whose published template writes nothing after the last answer."""
DIFFERENT = {
    "deepseek": [("Assistant: ", "Assistant:")],
    "llama2": [("[/INST] ", "[/INST]"), (" </s>", "</s>")],
    "olmo": [("</s>\n", "</s>"), ("?\n", "?")],
    "zephyr": [("</s>\n", "</s>")],
}
"""LLaMA-Factory leaves out spaces and newlines that the published template has."""
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def published(tokenizer: Any, name: str, example: Example, **options: Any) -> str:
    tokenizer.chat_template = PUBLISHED[name]
    opening = [{"role": "system", "content": example.system}] if example.system else []
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    text = tokenizer.apply_chat_template(opening + messages, tokenize=False, **options)
    for theirs, ours in DIFFERENT.get(name, []):
        text = text.replace(theirs, ours)
    return text + ANSWER_ENDS_LATER.get(name, "")


def joined(tokenizer: Any, name: str, example: Example, **options: Any) -> str:
    turns = encode_turns(tokenizer, name, example, **options)
    text = "".join(tokenizer.decode(side) for turn in turns for side in turn)
    return text + ANSWER_ENDS_LATER.get(name, "")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("turns", [2, 4])
def test_a_named_template_gives_the_text_of_the_published_one(
    tokenizer: PreTrainedTokenizerFast, name: str, turns: int
) -> None:
    system = "" if name in WITHOUT_SYSTEM else CHAT.system
    example = replace(CHAT, system=system, messages=CHAT.messages[:turns])
    # The published templates with thoughts write none before earlier questions.
    thinking = Thinking(keeps_history=False, fills_history=False)
    ours = joined(tokenizer, name, example, thinking=thinking)
    if name == "deepseekr1":  # which publishes no empty thought
        ours = ours.replace(EMPTY_THOUGHT, "")
    assert ours == published(tokenizer, name, example)


@pytest.mark.parametrize("name", ["qwen", "smollm2", "llama3", "yi", "chatml"])
def test_the_default_system_text_is_the_published_one(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    example = replace(CHAT, system="")
    assert joined(tokenizer, name, example) == published(tokenizer, name, example)


def test_thoughts_stay_where_the_published_template_keeps_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def think(message: Message) -> Message:
        return replace(message, content=f"<think>\nhm\n</think>\n\n{message.content}")

    messages = tuple(think(m) if m.role == "assistant" else m for m in CHAT.messages)
    example = replace(CHAT, messages=messages)
    thinking = Thinking(keeps_history=False, fills_history=False)
    ours = joined(tokenizer, "qwen3", example, thinking=thinking)
    assert ours == published(tokenizer, "qwen3", example)


def test_without_thinking_the_prompt_is_the_published_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = replace(CHAT, messages=CHAT.messages[:2])
    prompt, answer = encode_turns(tokenizer, "qwen3", example, thinking=Thinking(enabled=False))[0]
    asked = replace(example, messages=example.messages[:1])
    theirs = published(tokenizer, "qwen3", asked, add_generation_prompt=True, enable_thinking=False)
    assert tokenizer.decode(prompt) == theirs
    assert tokenizer.decode(answer) == "Ten miles.<|im_end|>\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_cover_the_answers_and_their_ends(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    template = TEMPLATES[name]
    [row], stats = tokenize_sft([CHAT], tokenizer, DataConfig(template=name))
    ends = f"{template.stop or '</s>'}"
    spans, span = [], []
    for label in [*row.labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            spans.append(tokenizer.decode(span))
            span = []
    thought = "".join(template.thought) if template.has_thoughts else ""
    forms = [
        template.assistant.replace("{eos}", "</s>").replace("{content}", text.content)
        for text in CHAT.messages[1::2]
    ]
    # Where the answer has no end of its own, the label after it is the end-of-sequence token.
    expected = [thought + form + ("</s>" if template.ends_with_eos else "") for form in forms]
    assert spans == expected
    assert stats.trained_tokens == sum(label != -100 for label in row.labels)
    if name != "empty":
        assert all(ends in span for span in spans)

"""Turns rows into prompts to sample answers to, with reference answers where rows have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.examples import to_example
from ulysses_core.data.files import Row
from ulysses_core.data.messages import Example
from ulysses_core.data.registry import DatasetSpec
from ulysses_core.data.stats import DataStats, Tally
from ulysses_core.data.thoughts import Thinking
from ulysses_core.data.turns import encode_batch
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "to_prompt", "tokenize_prompts"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to the answer that is to be sampled, and the row's own last answer."""

    example: Example
    """The conversation with its last answer, which is empty if the row has none."""

    @property
    def question(self) -> str:
        """The last message before the answer."""
        return self.example.messages[-2].content

    @property
    def answer(self) -> str | None:
        """The reference answer."""
        return self.example.messages[-1].content.strip() or None


def to_prompt(row: Row, spec: DatasetSpec) -> Prompt:
    """Returns the prompt of a row; the last answer, if there is one, is the reference answer.

    Raises:
        InputError: As `to_example`, but the last answer may be missing; or the prompt is empty.
    """
    complete = _complete_alpaca if spec.formatting == "alpaca" else _complete_sharegpt
    prompt = Prompt(to_example(*complete(row, spec), needs_answer=False))
    if not prompt.question.strip():
        raise InputError(f"{row.where}: the prompt is empty; expected text")
    return prompt


def _complete_alpaca(row: Row, spec: DatasetSpec) -> tuple[Row, DatasetSpec]:
    """Gives a row without an answer an empty one."""
    column = spec.columns.response or "output"
    if spec.columns.response and row.values.get(column) is not None:
        return row, spec
    columns = spec.columns.model_copy(update={"response": column})
    return replace(row, values=row.values | {column: ""}), replace(spec, columns=columns)


def _complete_sharegpt(row: Row, spec: DatasetSpec) -> tuple[Row, DatasetSpec]:
    """Gives a conversation that ends with a prompt an empty answer."""
    tags, column = spec.tags, spec.columns.messages or ""
    turns = row.values.get(column)
    last = turns[-1] if isinstance(turns, list) and turns else None
    prompts = (tags.user_tag, tags.observation_tag)
    if not isinstance(last, dict) or last.get(tags.role_tag) not in prompts:
        return row, spec
    empty = {tags.role_tag: tags.assistant_tag, tags.content_tag: ""}
    return replace(row, values=row.values | {column: [*(turns or []), empty]}), spec


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    """Tokenises prompts into rows of `prompt` (token ids), `question`, `answer` and `where`.

    A prompt of more than `cutoff_len` tokens gives no row, because a cut question is another one.
    """
    rows: list[dict[str, Any]] = []
    tally = Tally()
    for prompt, ids in zip(prompts, _encode(prompts, tokenizer, config), strict=True):
        where = prompt.example.where
        tally.examples += 1
        if len(ids) > config.cutoff_len:
            limit = f"expected at most {config.cutoff_len} (cutoff_len)"
            tally.drop(where, f"the prompt has {len(ids)} tokens; {limit}")
            continue
        rows.append(
            {"prompt": ids, "question": prompt.question, "answer": prompt.answer, "where": where}
        )
    tokens = sum(len(row["prompt"]) for row in rows)
    return rows, tally.finish(rows=len(rows), tokens=tokens, trained_tokens=0)


def _encode(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[list[int]]:
    encoded = encode_batch(
        tokenizer,
        config.template,
        [prompt.example for prompt in prompts],
        default_system=config.default_system,
        tool_format=config.tool_format,
        thinking=Thinking(
            enabled=config.enable_thinking,
            keeps_history=config.preserve_thinking,
            fills_history=False,
        ),
    )
    return [
        [*(token for turn in earlier for part in turn for token in part), *last]
        for *earlier, (last, _) in encoded
    ]

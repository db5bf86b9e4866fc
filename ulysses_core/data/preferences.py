"""Turns preference examples into token rows: pairs for `dpo` and `rm`, tagged answers for `kto`.

A row keeps prompt and answer apart. If both do not fit into `cutoff_len`, they are cut by
LLaMA-Factory's rule, and the two answers of a pair as if each were the longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.messages import Example, Pair, Tagged
from ulysses_core.data.stats import DataStats, Tally
from ulysses_core.data.thoughts import Thinking
from ulysses_core.data.tokenize import share_budget
from ulysses_core.data.turns import encode_batch, find_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["find_one_sided", "tokenize_pairs", "tokenize_tagged"]

Tokens = list[int]


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    """Tokenises pairs into rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    A pair whose answers are equal within `cutoff_len` gives no row.
    """
    chosen = _encode([pair.chosen for pair in pairs], tokenizer, config)
    rejected = _encode([pair.rejected for pair in pairs], tokenizer, config)
    rows, tally = [], Tally()
    for pair, (prompt, better), (_, worse) in zip(pairs, chosen, rejected, strict=True):
        longer = max(len(better), len(worse))
        kept, room = share_budget(len(prompt), longer, config.cutoff_len)
        row = {
            "prompt_ids": prompt[:kept],
            "chosen_ids": better[:room],
            "rejected_ids": worse[:room],
        }
        where = pair.chosen.where
        _count_cut(tally, where, len(prompt) - kept, longer - room)
        # Answers that differ only beyond the cut teach nothing.
        if row["chosen_ids"] != row["rejected_ids"] and row["chosen_ids"] and row["rejected_ids"]:
            rows.append(row)
        else:
            problem = f"the answers do not differ within cutoff_len {config.cutoff_len}"
            tally.drop(where, problem)
    return rows, _finish(tally, rows)


def tokenize_tagged(
    tagged: Sequence[Tagged], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    """Tokenises tagged answers into rows of `prompt_ids`, `completion_ids` and `label`."""
    encoded = _encode([each.example for each in tagged], tokenizer, config)
    rows, tally = [], Tally()
    for (prompt, answer), each in zip(encoded, tagged, strict=True):
        kept, room = share_budget(len(prompt), len(answer), config.cutoff_len)
        where = each.example.where
        _count_cut(tally, where, len(prompt) - kept, len(answer) - room)
        if answer[:room]:
            rows.append(
                {
                    "prompt_ids": prompt[:kept],
                    "completion_ids": answer[:room],
                    "label": each.is_desirable,
                }
            )
        else:
            problem = f"no token of the answer is within cutoff_len {config.cutoff_len}"
            tally.drop(where, problem)
    return rows, _finish(tally, rows)


def find_one_sided(tagged: Sequence[Tagged]) -> str:
    """Returns what is wrong with answers that all have the same tag; empty if they do not."""
    tags = {each.is_desirable for each in tagged}
    if len(tags) != 1:
        return ""
    return (
        f"kto_tag is {str(tags.pop()).lower()} in all {len(tagged)} examples; expected desirable "
        "and undesirable ones"
    )


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[tuple[Tokens, Tokens]]:
    """Yields the tokens before the last answer, and those of the last answer."""
    thinking = Thinking(
        enabled=config.enable_thinking,
        keeps_history=config.preserve_thinking,
        fills_history=False,
    )
    end = find_end(tokenizer, config.template)
    size = config.preprocessing_batch_size
    for start in range(0, len(examples), size):
        for turns in encode_batch(
            tokenizer,
            config.template,
            examples[start : start + size],
            default_system=config.default_system,
            tool_format=config.tool_format,
            thinking=thinking,
        ):
            *earlier, (prompt, answer) = turns
            history = [token for turn in earlier for part in turn for token in part]
            yield history + prompt, answer + end


def _count_cut(tally: Tally, where: str, prompt: int, answer: int) -> None:
    tally.examples += 1
    if prompt or answer:
        tally.cut(where, is_answer=answer > 0)


def _finish(tally: Tally, rows: Sequence[dict[str, Any]]) -> DataStats:
    trained = _count(rows, lambda key: key not in ("prompt_ids", "label"))
    return tally.finish(
        rows=len(rows),
        tokens=trained + _count(rows, lambda key: key == "prompt_ids"),
        trained_tokens=trained,
    )


def _count(rows: Sequence[dict[str, Any]], is_counted: Callable[[str], bool]) -> int:
    return sum(len(value) for row in rows for key, value in row.items() if is_counted(key))

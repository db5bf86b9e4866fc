"""Turns preference examples into token rows: pairs for `dpo` and `rm`, tagged answers for `kto`.

A row keeps prompt and answer apart. If both do not fit into `cutoff_len`, they are cut by
LLaMA-Factory's rule, and the two answers of a pair as if each were the longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.examples import Example, Pair, Tagged
from ulysses_core.data.tokenize import DataStats, share_budget
from ulysses_core.data.turns import encode_batch
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_pairs", "tokenize_tagged"]

_BATCH = 1000

Tokens = list[int]


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    """Tokenises pairs into rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        InputError: No pair has a token of both answers within `cutoff_len`.
    """
    chosen = _encode([pair.chosen for pair in pairs], tokenizer, config)
    rejected = _encode([pair.rejected for pair in pairs], tokenizer, config)
    rows, truncated = [], 0
    for (prompt, better), (_, worse) in zip(chosen, rejected, strict=True):
        kept, room = share_budget(len(prompt), max(len(better), len(worse)), config.cutoff_len)
        row = {
            "prompt_ids": prompt[:kept],
            "chosen_ids": better[:room],
            "rejected_ids": worse[:room],
        }
        truncated += kept < len(prompt) or room < max(len(better), len(worse))
        # Answers that differ only beyond the cut teach nothing.
        if row["chosen_ids"] != row["rejected_ids"] and row["chosen_ids"] and row["rejected_ids"]:
            rows.append(row)
    return _checked(rows, len(pairs), truncated, config)


def tokenize_tagged(
    tagged: Sequence[Tagged], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    """Tokenises tagged answers into rows of `prompt_ids`, `completion_ids` and `label`.

    Raises:
        InputError: All tags are equal, or no answer has a token within `cutoff_len`.
    """
    tags = {each.is_desirable for each in tagged}
    if len(tags) == 1:
        raise InputError(
            f"kto_tag is {str(tags.pop()).lower()} in all {len(tagged)} examples; expected "
            "desirable and undesirable ones"
        )
    encoded = _encode([each.example for each in tagged], tokenizer, config)
    rows, truncated = [], 0
    for (prompt, answer), each in zip(encoded, tagged, strict=True):
        kept, room = share_budget(len(prompt), len(answer), config.cutoff_len)
        truncated += kept < len(prompt) or room < len(answer)
        if answer[:room]:
            rows.append(
                {
                    "prompt_ids": prompt[:kept],
                    "completion_ids": answer[:room],
                    "label": each.is_desirable,
                }
            )
    return _checked(rows, len(tagged), truncated, config)


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[tuple[Tokens, Tokens]]:
    """Yields the tokens before the last answer, and those of the last answer."""
    for start in range(0, len(examples), _BATCH):
        for turns in encode_batch(
            tokenizer,
            config.template,
            examples[start : start + _BATCH],
            default_system=config.default_system,
        ):
            *earlier, (prompt, answer) = turns
            yield [*(token for turn in earlier for part in turn for token in part), *prompt], answer


def _checked(
    rows: list[dict[str, Any]], examples: int, truncated: int, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    if not rows:
        raise InputError(
            f"cutoff_len is {config.cutoff_len}, which leaves no answers to compare in any of the "
            f"{examples} examples; raise cutoff_len"
        )
    trained = _count(rows, lambda key: key not in ("prompt_ids", "label"))
    return rows, DataStats(
        examples=examples,
        dropped=examples - len(rows),
        truncated=truncated,
        rows=len(rows),
        tokens=trained + _count(rows, lambda key: key == "prompt_ids"),
        trained_tokens=trained,
    )


def _count(rows: Sequence[dict[str, Any]], is_counted: Callable[[str], bool]) -> int:
    return sum(len(value) for row in rows for key, value in row.items() if is_counted(key))

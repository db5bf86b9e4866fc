"""Turns examples into token rows: masks labels, truncates, and cuts documents into blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from ulysses_core.data.config import DataConfig
from ulysses_core.data.examples import Example
from ulysses_core.data.packing import TokenRow, pack_rows
from ulysses_core.data.templates import get_template
from ulysses_core.data.turns import Turn, encode_batch
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataStats", "build_row", "share_budget", "tokenize_pt", "tokenize_sft"]

logger = logging.getLogger(__name__)

_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """Statistics of a split."""

    examples: int
    """Examples read, after `num_samples` and `max_samples`."""
    dropped: int
    """Examples without a label after truncation, and blank documents."""
    truncated: int
    """Examples cut off at `cutoff_len`."""
    rows: int
    """Rows in the dataset; fewer than examples if they are packed."""
    tokens: int
    """Tokens in those rows."""
    trained_tokens: int
    """Tokens with a label."""


def tokenize_sft(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[TokenRow], DataStats]:
    """Tokenises conversations, masks the labels of prompts, and packs if `config` says so.

    Returns:
        Rows of at most `cutoff_len` tokens, and their statistics.

    Raises:
        InputError: The template does not fit the tokenizer, or no conversation has an answer token
            within `cutoff_len`.
    """
    _warn_of_split_stop(tokenizer, config.template)
    rows: list[TokenRow] = []
    truncated = 0
    for turns in _encode(examples, tokenizer, config):
        row = build_row(turns, config)
        truncated += len(row.input_ids) < sum(len(prompt) + len(answer) for prompt, answer in turns)
        # The first label is unused: a model cannot predict the token that it sees first.
        if any(label != IGNORE_INDEX for label in row.labels[1:]):
            rows.append(row)
    if not rows:
        raise InputError(
            f"cutoff_len is {config.cutoff_len}, which leaves no answer token in any of the "
            f"{len(examples)} examples; raise cutoff_len"
        )
    kept = len(rows)
    if config.packing or config.neat_packing:
        rows = pack_rows(rows, config.cutoff_len)
    return rows, _count(rows, len(examples), len(examples) - kept, truncated)


def tokenize_pt(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[TokenRow], DataStats]:
    """Tokenises documents and ends each with the end-of-sequence token.

    With packing, the documents form one stream, which is cut into blocks of `cutoff_len` tokens;
    a shorter last block is dropped unless it is the only one. With `neat_packing`, documents are
    cut at `cutoff_len`, packed into blocks, and attention never crosses them. Without packing,
    each document is truncated to `cutoff_len`.

    Raises:
        InputError: The tokenizer has no end-of-sequence token, or all documents are blank.
    """
    texts = [document for document in documents if document.strip()]
    if not texts:
        raise InputError(
            f"all {len(documents)} documents are blank; expected at least one with text"
        )
    size = config.cutoff_len
    encoded = list(_encode_documents(texts, tokenizer))
    truncated = 0
    if config.neat_packing:
        pieces = [piece for ids in encoded for piece in _cut(ids, size)]
        rows = pack_rows([_label_all(piece) for piece in pieces], size)
    elif config.packing is not False:
        stream = list(chain.from_iterable(encoded))
        blocks = list(_cut(stream, size))
        if len(blocks) > 1 and len(blocks[-1]) < size:
            blocks.pop()
        rows = [_label_all(block) for block in blocks]
    else:
        truncated = sum(len(ids) > size for ids in encoded)
        rows = [_label_all(ids[:size]) for ids in encoded]
    return rows, _count(rows, len(documents), len(documents) - len(texts), truncated)


def build_row(turns: Sequence[Turn], config: DataConfig) -> TokenRow:
    """Joins turns into one row of at most `cutoff_len` tokens, with labels.

    If the turns do not fit, the first ones have priority, or with `mask_history` the last ones.
    Turns that get no tokens are dropped.
    """
    by_priority = reversed(turns) if config.mask_history else iter(turns)
    fitted = list(_fit(by_priority, config.cutoff_len))
    if config.mask_history:
        fitted.reverse()
    row = TokenRow([], [])
    for index, (prompt, answer) in enumerate(fitted):
        is_trained = not config.mask_history or index == len(fitted) - 1
        row.input_ids.extend(prompt + answer)
        row.labels.extend(prompt if config.train_on_prompt else _mask(prompt))
        row.labels.extend(answer if is_trained else _mask(answer))
    return row


def share_budget(prompt_len: int, answer_len: int, budget: int) -> tuple[int, int]:
    """Returns how many tokens of a prompt and of its answer to keep within `budget`.

    LLaMA-Factory's rule: an answer shorter than half of the budget is kept in full and the prompt
    is cut; otherwise a prompt shorter than half of it is kept and the answer is cut; if both are
    longer, both are cut in proportion.
    """
    if 2 * answer_len < budget:
        answer_room = budget
    elif 2 * prompt_len < budget:
        answer_room = budget - prompt_len
    else:
        answer_room = int(budget * (answer_len / (prompt_len + answer_len)))
    answer_kept = min(answer_len, answer_room)
    return min(prompt_len, budget - answer_kept), answer_kept


def _fit(turns: Iterable[Turn], room: int) -> Iterator[Turn]:
    for prompt, answer in turns:
        if room <= 0:
            return
        prompt_kept, answer_kept = share_budget(len(prompt), len(answer), room)
        room -= prompt_kept + answer_kept
        yield prompt[:prompt_kept], answer[:answer_kept]


def _mask(ids: Sequence[int]) -> list[int]:
    return [IGNORE_INDEX] * len(ids)


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[list[Turn]]:
    for start in range(0, len(examples), _BATCH):
        yield from encode_batch(
            tokenizer,
            config.template,
            examples[start : start + _BATCH],
            default_system=config.default_system,
            last_turn_only=config.mask_history,
        )


def _encode_documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, with which stage pt ends each document; "
            "set the tokenizer's eos_token"
        )
    adds_bos = getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None
    opening = [tokenizer.bos_token_id] if adds_bos else []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(texts[start : start + _BATCH], add_special_tokens=False)
        for ids in batch["input_ids"]:
            yield [*opening, *ids, eos]


def _cut(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _label_all(ids: list[int]) -> TokenRow:
    return TokenRow(ids, list(ids))


def _count(rows: Sequence[TokenRow], examples: int, dropped: int, truncated: int) -> DataStats:
    return DataStats(
        examples=examples,
        dropped=dropped,
        truncated=truncated,
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:]),
    )


def _warn_of_split_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Warns if the tokenizer splits the template's stop text into several tokens."""
    stop = get_template(template).stop if template else None
    if stop and len(tokenizer(stop, add_special_tokens=False)["input_ids"]) > 1:
        logger.warning(
            "template %r ends answers with %r, which is not a single token of this tokenizer, so "
            "it is tokenised as text",
            template,
            stop,
        )

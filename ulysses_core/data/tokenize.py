"""Turns examples into token rows: masks, truncation, and the cutting of documents into blocks."""

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
    """What became of a split's examples."""

    examples: int
    """Read from the files, after `num_samples` and `max_samples`."""
    dropped: int
    """Left out: no token to learn was left after truncation, or the document was blank."""
    truncated: int
    """Lost tokens to `cutoff_len`."""
    rows: int
    """In the dataset; fewer than the examples when they are packed."""
    tokens: int
    """In those rows."""
    trained_tokens: int
    """Of those tokens, the ones that have a label."""


def tokenize_sft(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[TokenRow], DataStats]:
    """Tokenises conversations, masks what is not to be learned, and packs them if asked to.

    Returns:
        Rows of at most `cutoff_len` tokens, and the counts.

    Raises:
        InputError: The template does not fit the tokenizer, or no conversation has a token to learn
            within `cutoff_len`.
    """
    _warn_of_missing_stop(tokenizer, config.template)
    rows: list[TokenRow] = []
    truncated = 0
    for turns in _encode(examples, tokenizer, config):
        row = build_row(turns, config)
        truncated += len(row.input_ids) < sum(len(prompt) + len(answer) for prompt, answer in turns)
        # The first label is never used: a model predicts the token after the ones it has seen.
        if any(label != IGNORE_INDEX for label in row.labels[1:]):
            rows.append(row)
    if not rows:
        raise InputError(
            f"none of the {len(examples)} examples has an answer token within "
            f"cutoff_len={config.cutoff_len}: raise cutoff_len"
        )
    kept = len(rows)
    if config.packs("sft"):
        rows = pack_rows(rows, config.cutoff_len)
    return rows, _stats(rows, len(examples), len(examples) - kept, truncated)


def tokenize_pt(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[TokenRow], DataStats]:
    """Tokenises documents, each closed by the end-of-sequence token.

    Packed, the documents form one stream, which is cut into blocks of `cutoff_len`; a remainder is
    dropped unless it is the only block. `neat_packing` keeps the documents of a block apart
    instead. Not packed, each document is cut off at `cutoff_len`.

    Raises:
        InputError: The tokenizer has no end-of-sequence token, or all documents are blank.
    """
    texts = [document for document in documents if document.strip()]
    if not texts:
        raise InputError(f"all of the {len(documents)} documents are blank")
    size = config.cutoff_len
    encoded = list(_encode_documents(texts, tokenizer))
    truncated = 0
    if config.neat_packing:
        rows = pack_rows([_plain(piece) for ids in encoded for piece in _cut(ids, size)], size)
    elif config.packs("pt"):
        stream = list(chain.from_iterable(encoded))
        blocks = list(_cut(stream, size))
        if len(blocks) > 1 and len(blocks[-1]) < size:
            blocks.pop()
        rows = [_plain(block) for block in blocks]
    else:
        truncated = sum(len(ids) > size for ids in encoded)
        rows = [_plain(ids[:size]) for ids in encoded]
    return rows, _stats(rows, len(documents), len(documents) - len(texts), truncated)


def build_row(turns: Sequence[Turn], config: DataConfig) -> TokenRow:
    """Joins turns into one row of at most `cutoff_len` tokens, with labels.

    The turns that come first in order of importance get the room: the first ones, or with
    `mask_history` the last ones. Turns for which none is left are dropped.
    """
    important = reversed(turns) if config.mask_history else iter(turns)
    fitted = list(_fit(important, config.cutoff_len))
    if config.mask_history:
        fitted.reverse()
    row = TokenRow([], [])
    for index, (prompt, answer) in enumerate(fitted):
        learned = not config.mask_history or index == len(fitted) - 1
        row.input_ids.extend(prompt + answer)
        row.labels.extend(prompt if config.train_on_prompt else _masked(prompt))
        row.labels.extend(answer if learned else _masked(answer))
    return row


def share_budget(prompt_len: int, answer_len: int, budget: int) -> tuple[int, int]:
    """Returns how many tokens of a prompt and of its answer are kept within `budget`.

    LLaMA-Factory's rule: a side shorter than half of the budget is kept whole and the other one is
    cut (the answer first in line to be kept); two long sides are cut in proportion.
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


def _masked(ids: Sequence[int]) -> list[int]:
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
            "stage pt closes each document with the end-of-sequence token and the tokenizer has "
            "none: set the tokenizer's eos_token"
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


def _plain(ids: list[int]) -> TokenRow:
    return TokenRow(ids, list(ids))


def _stats(rows: Sequence[TokenRow], examples: int, dropped: int, truncated: int) -> DataStats:
    return DataStats(
        examples=examples,
        dropped=dropped,
        truncated=truncated,
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:]),
    )


def _warn_of_missing_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Warns where a template's end mark would be spelled out in several tokens."""
    stop = get_template(template).stop if template else None
    if stop and len(tokenizer(stop, add_special_tokens=False)["input_ids"]) > 1:
        logger.warning(
            "template %r ends answers with %r, which is no token of this tokenizer: "
            "it is written as plain text",
            template,
            stop,
        )

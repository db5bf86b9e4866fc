"""Turns examples into token rows: masks labels, truncates, and cuts documents into blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from ulysses_core.data.config import DataConfig
from ulysses_core.data.messages import Example
from ulysses_core.data.packing import TokenRow, pack_rows
from ulysses_core.data.stats import DataStats, Tally
from ulysses_core.data.templates import get_template
from ulysses_core.data.thoughts import Thinking
from ulysses_core.data.turns import Turn, encode_batch, find_end
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataStats", "build_row", "share_budget", "tokenize_pt", "tokenize_sft"]

logger = logging.getLogger(__name__)


def tokenize_sft(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[TokenRow], DataStats]:
    """Tokenises conversations, masks the labels of prompts, and packs if `config` says so.

    Returns:
        Rows of at most `cutoff_len` tokens, and their statistics. A conversation without an answer
        token within `cutoff_len` gives no row.

    Raises:
        InputError: The template does not fit the tokenizer or the config.
    """
    _warn_of_split_stop(tokenizer, config.template)
    end = find_end(tokenizer, config.template)
    if end and config.train_on_prompt:
        raise InputError(
            f"train_on_prompt is true, which template {config.template!r} does not allow, because "
            "it ends answers with what follows them; remove train_on_prompt"
        )
    rows: list[TokenRow] = []
    tally = Tally()
    for example, turns in zip(examples, _encode(examples, tokenizer, config), strict=True):
        row = build_row(turns, config, end)
        _count_cut(tally, example, turns, row, len(end))
        # The first label is unused: a model cannot predict the token that it sees first.
        if _has_answer(row, len(end)):
            rows.append(row)
        else:
            problem = f"no token of an answer is within cutoff_len {config.cutoff_len}"
            tally.drop(example.where, problem)
    if config.packing or config.neat_packing:
        rows = pack_rows(rows, config.cutoff_len)
    return rows, _finish(tally, rows)


def _has_answer(row: TokenRow, end: int) -> bool:
    return any(label != IGNORE_INDEX for label in row.labels[1 : len(row.labels) - end])


def _count_cut(
    tally: Tally, example: Example, turns: Sequence[Turn], row: TokenRow, end: int
) -> None:
    tally.examples += 1
    missing = sum(len(side) for turn in turns for side in turn) + end - len(row.input_ids)
    if missing > 0:
        # What is cut is at the end, unless only prompts were too long.
        answers = sum(len(answer) for _, answer in turns)
        kept = row.answer_tokens
        tally.cut(example.where, is_answer=kept < answers)


def tokenize_pt(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[TokenRow], DataStats]:
    """Tokenises documents and ends each with the end-of-sequence token.

    With packing, the documents form one stream, which is cut into blocks of `cutoff_len` tokens;
    a shorter last block is dropped unless it is the only one. With `neat_packing`, documents are
    cut at `cutoff_len`, packed into blocks, and attention never crosses them. Without packing,
    each document is truncated to `cutoff_len`.

    Raises:
        InputError: The tokenizer has no end-of-sequence token.
    """
    size = config.cutoff_len
    encoded = list(_encode_documents(documents, tokenizer, config.preprocessing_batch_size))
    tally = Tally()
    tally.examples = len(documents)
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
        for ids in encoded:
            if len(ids) > size:
                tally.cut("", is_answer=False)
        rows = [_label_all(ids[:size]) for ids in encoded]
    return rows, _finish(tally, rows)


def build_row(turns: Sequence[Turn], config: DataConfig, end: Sequence[int] = ()) -> TokenRow:
    """Joins turns into one row of at most `cutoff_len` tokens, with labels.

    If the turns do not fit, the first ones have priority, or with `mask_history` the last ones.
    Turns that get no tokens are dropped.

    Args:
        turns: (prompt ids, answer ids) of each turn.
        config: the data settings.
        end: the token after the last answer, for templates whose answers have no end of their own.
            After an earlier answer it is the label only, at the first token of the next prompt.
    """
    by_priority = reversed(turns) if config.mask_history else iter(turns)
    fitted = list(_fit(by_priority, config.cutoff_len - len(end)))
    if config.mask_history:
        fitted.reverse()
    row = TokenRow([], [])
    for index, (prompt, answer) in enumerate(fitted):
        is_trained = not config.mask_history or index == len(fitted) - 1
        row.input_ids.extend(prompt + answer)
        row.labels.extend(prompt if config.train_on_prompt else _mask(prompt))
        if end and index and prompt and not config.mask_history:
            row.labels[-len(prompt)] = end[0]
        row.labels.extend(answer if is_trained else _mask(answer))
        row.answer_tokens += len(answer)
    row.input_ids.extend(end)
    row.labels.extend(end)
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
    keeps = not config.mask_history or config.preserve_thinking
    thinking = Thinking(enabled=config.enable_thinking, keeps_history=keeps, fills_history=keeps)
    size = config.preprocessing_batch_size
    for start in range(0, len(examples), size):
        yield from encode_batch(
            tokenizer,
            config.template,
            examples[start : start + size],
            default_system=config.default_system,
            tool_format=config.tool_format,
            thinking=thinking,
        )


def _encode_documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, with which stage pt ends each document; "
            "set the tokenizer's eos_token"
        )
    adds_bos = getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None
    opening = [tokenizer.bos_token_id] if adds_bos else []
    for start in range(0, len(texts), size):
        batch = tokenizer(texts[start : start + size], add_special_tokens=False)
        for ids in batch["input_ids"]:
            yield [*opening, *ids, eos]


def _cut(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _label_all(ids: list[int]) -> TokenRow:
    return TokenRow(ids, list(ids))


def _finish(tally: Tally, rows: Sequence[TokenRow]) -> DataStats:
    return tally.finish(
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

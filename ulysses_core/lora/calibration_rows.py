"""The rows on which an initialisation runs the model: cut, batched and put on a device.

Shapes: B rows, S tokens in the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ulysses_core.data.collate import CausalCollator
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_TOKENS", "TokenRows", "group_rows", "prepare_rows", "single_rows"]

MOST_TOKENS = 2048
"""Tokens of a row that are used: those of the rows that CorDA's authors ran."""

TokenRows = Sequence[Mapping[str, Any]]
"""Rows of token ids: `input_ids`, and `labels` and `position_ids` if they have them."""

_COLLATE = CausalCollator(pad_token_id=0)  # padding is masked


def prepare_rows(rows: TokenRows, init: str) -> TokenRows:
    """Cuts rows to `MOST_TOKENS`, and leaves out those of which no label is left.

    Without labels every token is one.

    Raises:
        InputError: no row is left.
    """
    cut = [
        {key: list(row[key])[:MOST_TOKENS] for key in ("input_ids", "labels", "position_ids")
         if row.get(key) is not None}
        for row in rows
    ]  # fmt: skip
    labelled = [{"labels": row["input_ids"], **row} for row in cut]
    kept = [row for row in labelled if _count_labels(row)]
    if not kept:
        raise InputError(
            f"lora_init is {init}, which looks at rows to train on, and "
            + (f"none of {len(rows)} has a label in its first {MOST_TOKENS} tokens" if rows else
               "there are none")
        )  # fmt: skip
    return kept


def _count_labels(row: Mapping[str, Any]) -> int:
    # The first label is unused: a model cannot predict the token that it sees first.
    return sum(label != IGNORE_INDEX for label in row["labels"][1:])


def single_rows(rows: TokenRows, device: torch.device | str) -> Iterator[dict[str, torch.Tensor]]:
    """Yields each row as a batch of its own, without padding: tensors [1, S]."""
    for row in rows:
        yield {key: value.to(device) for key, value in _COLLATE([row]).items()}


def group_rows(rows: TokenRows, r: int) -> list[dict[str, torch.Tensor]]:
    """Returns batches with enough labels for EVA's directions: tensors [B, S].

    PEFT computes 4 r directions of the tokens with labels, which are twice as many here.

    Raises:
        InputError: all rows together have too few.
    """
    groups: list[list[Mapping[str, Any]]] = [[]]
    for row in rows:
        if _count(groups[-1]) >= 8 * r:
            groups.append([])
        groups[-1].append(row)
    if len(groups) > 1 and _count(groups[-1]) < 8 * r:
        rest = groups.pop()
        groups[-1] += rest
    if _count(groups[0]) < 4 * r:
        raise InputError(
            f"lora_init is eva: its rows have {_count(groups[0])} tokens with labels; expected at "
            f"least {4 * r}, four for each rank, so raise lora_init_rows or lower lora_rank"
        )
    return [_COLLATE(group) for group in groups]


def _count(group: TokenRows) -> int:
    return sum(map(_count_labels, group))

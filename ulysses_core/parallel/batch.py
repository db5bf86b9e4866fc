"""Turns a batch of whole rows into this rank's slices, and says what attention must know.

Legend: B rows, S tokens of a whole row (padded to a multiple of n), s = S / n, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_core.parallel.groups import SequenceGroup
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.batch_keys import IGNORE_INDEX, names_by_slicing

__all__ = ["RowContext", "Rows", "shard_batch"]

_T = TypeVar("_T")

_SLICED, _REBUILT = names_by_slicing("sliced"), names_by_slicing("rebuilt")


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the documents of whole rows begin and end, as attention must know; made once a step.

    Attributes:
        length: tokens of a row before padding to a multiple of n.
        boundaries: per row, where its documents begin, and S; None where each row is one document.
    """

    length: int
    boundaries: tuple[tuple[int, ...], ...] | None
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    def cached(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What the first layer to ask has made."""
        if key not in self._cache:
            self._cache[key] = make()
        made: _T = self._cache[key]
        return made

    def cu_seqlens(self, rows: int, size: int, device: torch.device) -> tuple[Tensor, int]:
        """Where documents begin in all rows end to end, int32 [documents + 1]; and the longest."""
        return self.cached(("cu_seqlens", device), lambda: self._cu_seqlens(rows, size, device))

    def _cu_seqlens(self, rows: int, size: int, device: torch.device) -> tuple[Tensor, int]:
        starts = [
            row * size + start
            for row, boundaries in enumerate(self.boundaries or [(0, size)] * rows)
            for start in boundaries[:-1]
        ]
        cumulative = [*starts, rows * size]
        longest = max(b - a for a, b in pairwise(cumulative))
        return torch.tensor(cumulative, dtype=torch.int32, device=device), longest

    def documents(self, rows: int, size: int, device: torch.device) -> Tensor:
        """The number of each token's document within its row [B, S]."""
        numbers = torch.zeros(rows, size, dtype=torch.long)
        for row, boundaries in enumerate(self.boundaries or ()):
            for start in boundaries[1:-1]:
                numbers[row, start:] += 1
        return numbers.to(device)


@dataclass(frozen=True, eq=False)
class RowContext:
    """What reaches every attention layer.

    Attributes:
        group: the sequence group.
        rows: the rows' documents.
        core: key of `cores.CORES`.
    """

    group: SequenceGroup
    rows: Rows
    core: str = "sdpa"


def shard_batch(
    inputs: Mapping[str, Any],
    group: SequenceGroup,
    *,
    core: str = "sdpa",
    max_positions: int | None = None,
) -> dict[str, Any]:
    """This rank's slice of a batch, ready for the model.

    Labels are shifted on the whole row, so the last token of a slice learns to predict the first
    of the next. Rows are padded to a multiple of the group's size.

    Args:
        inputs: `input_ids` [B, S'], and where present `labels`, `attention_mask`, `position_ids`
            of the same shape.
        group: the sequence group.
        core: what attends, a key of `cores.CORES`.
        max_positions: tokens that a document may have at most; None for any number.

    Returns:
        `input_ids`, `position_ids`, `labels` and `shift_labels` [B, s], and `ulysses`, the
        `RowContext` that reaches every attention layer as a keyword.

    Raises:
        InputError: the batch holds something that cannot be sliced, or too long a document.
    """
    ids = _checked_ids(inputs)
    positions: Tensor | None = inputs.get("position_ids")
    pad = -ids.shape[1] % group.size
    rows = _rows(ids, inputs.get("attention_mask"), positions, pad)
    _check_positions(rows, max_positions)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    sharded = {
        "input_ids": _slice(F.pad(ids, (0, pad)), group),
        "position_ids": _slice(F.pad(positions, (0, pad)), group),
        "ulysses": RowContext(group, rows, core),
    }
    sharded |= _slice_labels(inputs, pad, group)
    return {k: v for k, v in inputs.items() if k not in _SLICED | _REBUILT} | sharded


def _checked_ids(inputs: Mapping[str, Any]) -> Tensor:
    """Returns `input_ids`; refuses a batch without them, or with keys that nothing slices."""
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise InputError("sequence parallel: the batch has no input_ids, which are what is sliced")
    unknown = [
        key
        for key, value in inputs.items()
        if key not in _SLICED | _REBUILT and isinstance(value, Tensor) and value.dim() > 1
    ]
    if unknown:
        raise InputError(
            f"sequence parallel: the batch has {unknown}, which cannot be sliced; "
            f"allowed: {', '.join(sorted(_SLICED))}"
        )
    ids: Tensor = inputs["input_ids"]
    return ids


def _slice_labels(inputs: Mapping[str, Any], pad: int, group: SequenceGroup) -> dict[str, Tensor]:
    """This rank's labels under both names; empty for a batch without labels."""
    shifted = _shifted_labels(inputs)
    if shifted is None:
        return {}
    own = _slice(F.pad(shifted, (0, pad), value=IGNORE_INDEX), group)
    # Models compute a loss if `labels` is given, and use `shift_labels` for it.
    return {"shift_labels": own, "labels": own}


def _shifted_labels(inputs: Mapping[str, Any]) -> Tensor | None:
    if inputs.get("shift_labels") is not None:
        shifted: Tensor = inputs["shift_labels"]
        return shifted
    labels: Tensor | None = inputs.get("labels")
    return None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _slice(rows: Tensor, group: SequenceGroup) -> Tensor:
    return rows.chunk(group.size, dim=1)[group.rank].contiguous()


def _rows(ids: Tensor, mask: Tensor | None, positions: Tensor | None, pad: int) -> Rows:
    """The documents of rows [B, S'] that `pad` tokens are added to.

    As in transformers, rows are packed where positions restart and no attention mask is given.
    Padding on the right needs no boundary, since no token looks ahead; padding before a token does.
    What is added is a document of its own where there are several.
    """
    length = ids.shape[1]
    starts = _starts(mask, positions)
    if starts is None:
        return Rows(length, None)
    by_row: list[list[int]] = [[0] for _ in ids]
    for row, start in starts.nonzero().tolist():  # one copy to the host for all rows
        by_row[row] += [start] if start else []
    end = (length, length + pad) if pad else (length,)
    several = any(len(documents) > 1 for documents in by_row)
    return Rows(length, tuple((*d, *end) for d in by_row) if several else None)


def _starts(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Whether a document begins at a token [B, S']; None where there is nothing to look at."""
    for name, value in (("attention_mask", mask), ("position_ids", positions)):
        if value is not None and value.dim() != 2:
            raise InputError(
                f"sequence parallel: {name} has {value.dim()} dimensions; allowed is [B, S]"
            )
    if mask is not None:
        seen = mask.ne(0)
        starts = F.pad(seen[:, 1:] & ~seen[:, :-1], (1, 0))
        if (starts & (seen.cumsum(1) > 1)).any():
            raise InputError(
                "sequence parallel: attention_mask hides tokens between others; allowed is padding "
                "before a row or after it"
            )
        return starts
    if positions is None:
        return None
    return F.pad(positions[:, 1:] - positions[:, :-1] != 1, (1, 0))


def _check_positions(rows: Rows, allowed: int | None) -> None:
    documents = rows.boundaries or [(0, rows.length)]
    longest = max(min(b, rows.length) - a for row in documents for a, b in pairwise(row))
    if allowed is not None and longest > allowed:
        raise InputError(
            f"sequence parallel: a row has {longest} tokens, but the model has positions for "
            f"{allowed}; cut rows to it (cutoff_len, max_length), or raise the model's "
            "max_position_embeddings"
        )

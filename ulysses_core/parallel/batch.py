"""Turns a batch of whole rows into this rank's slices and the context that attention needs.

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

__all__ = ["RowContext", "RowLayout", "shard_batch"]

_T = TypeVar("_T")

_SLICED, _REBUILT = names_by_slicing("sliced"), names_by_slicing("rebuilt")


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where the documents of a batch's rows begin and end.

    Attributes:
        length: tokens of a row before padding to a multiple of n.
        boundaries: for each row the first token of each document, then S; None if each row is one
            document.
    """

    length: int
    boundaries: tuple[tuple[int, ...], ...] | None
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    def cached(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Returns `make()`, called once; all attention layers of a step share the result."""
        if key not in self._cache:
            self._cache[key] = make()
        made: _T = self._cache[key]
        return made

    def cu_seqlens(self, rows: int, size: int, device: torch.device) -> tuple[Tensor, int]:
        """Returns cumulative document lengths over all rows, and the longest document.

        Args:
            rows: number of rows B.
            size: tokens of a row S.
            device: where to put the result.

        Returns:
            int32 [documents + 1], as FlashAttention's varlen functions take it; and a length.
        """
        return self.cached(
            ("cu_seqlens", device), lambda: self._make_cu_seqlens(rows, size, device)
        )

    def _make_cu_seqlens(self, rows: int, size: int, device: torch.device) -> tuple[Tensor, int]:
        starts = [
            row * size + start
            for row, boundaries in enumerate(self.boundaries or [(0, size)] * rows)
            for start in boundaries[:-1]
        ]
        cumulative = [*starts, rows * size]
        longest = max(b - a for a, b in pairwise(cumulative))
        return torch.tensor(cumulative, dtype=torch.int32, device=device), longest

    def document_ids(self, rows: int, size: int, device: torch.device) -> Tensor:
        """Returns the index of each token's document within its row, int64 [B, S]."""
        numbers = torch.zeros(rows, size, dtype=torch.long)
        for row, boundaries in enumerate(self.boundaries or ()):
            for start in boundaries[1:-1]:
                numbers[row, start:] += 1
        return numbers.to(device)


@dataclass(frozen=True, eq=False)
class RowContext:
    """What every attention layer needs to know of the batch.

    Attributes:
        group: the sequence group.
        layout: the documents of the rows.
        kernel: the attention kernel, a key of `kernels.KERNELS`.
        has_shifted_labels: whether the labels came shifted, so that a row has S of them.
        last_position: the largest position of all rows, a scalar.
    """

    group: SequenceGroup
    layout: RowLayout
    kernel: str = "sdpa"
    has_shifted_labels: bool = False
    last_position: Tensor | None = None


def shard_batch(
    inputs: Mapping[str, Any],
    group: SequenceGroup,
    *,
    kernel: str = "sdpa",
    max_positions: int | None = None,
) -> dict[str, Any]:
    """Cuts this rank's slice out of a batch, ready for the model.

    Labels are shifted on the whole row, so the last token of a slice predicts the first token of
    the next slice. Rows are padded to a multiple of the group's size.

    Args:
        inputs: `input_ids` [B, S'], and optionally `labels`, `attention_mask` and `position_ids`
            of the same shape.
        group: the sequence group.
        kernel: the attention kernel, a key of `kernels.KERNELS`.
        max_positions: maximum tokens of a document; None for any number.

    Returns:
        `input_ids`, `position_ids`, `labels` and `shift_labels` [B, s], and `ulysses`, the
        `RowContext` that models pass to every attention layer.

    Raises:
        InputError: a tensor of the batch cannot be sliced, or a document is too long.
    """
    ids = _checked_ids(inputs)
    positions: Tensor | None = inputs.get("position_ids")
    pad = -ids.shape[1] % group.size
    layout = _find_documents(ids, inputs.get("attention_mask"), positions, pad)
    _check_positions(layout, max_positions)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    has_shifted_labels = inputs.get("shift_labels") is not None
    sharded = {
        "input_ids": _slice(F.pad(ids, (0, pad)), group),
        "position_ids": _slice(F.pad(positions, (0, pad)), group),
        "ulysses": RowContext(group, layout, kernel, has_shifted_labels, positions.max()),
    }
    sharded |= _slice_labels(inputs, pad, group)
    return {k: v for k, v in inputs.items() if k not in _SLICED | _REBUILT} | sharded


def _checked_ids(inputs: Mapping[str, Any]) -> Tensor:
    """Returns `input_ids`; refuses a batch without them, or with keys that nothing slices."""
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise InputError(
            "sequence parallel: the batch has no input_ids; expected a tensor of token ids"
        )
    unknown = [
        key
        for key, value in inputs.items()
        if key not in _SLICED | _REBUILT and isinstance(value, Tensor) and value.dim() > 1
    ]
    if unknown:
        raise InputError(
            f"sequence parallel: the batch has {', '.join(unknown)}, which cannot be sliced; "
            f"allowed: {', '.join(sorted(_SLICED))}"
        )
    ids: Tensor = inputs["input_ids"]
    return ids


def _slice_labels(inputs: Mapping[str, Any], pad: int, group: SequenceGroup) -> dict[str, Tensor]:
    """Returns this rank's labels under both names; empty for a batch without labels."""
    shifted = _shift_labels(inputs)
    if shifted is None:
        return {}
    own = _slice(F.pad(shifted, (0, pad), value=IGNORE_INDEX), group)
    # Models compute a loss if they get `labels`, and then use `shift_labels` for it.
    return {"shift_labels": own, "labels": own}


def _shift_labels(inputs: Mapping[str, Any]) -> Tensor | None:
    if inputs.get("shift_labels") is not None:
        shifted: Tensor = inputs["shift_labels"]
        return shifted
    labels: Tensor | None = inputs.get("labels")
    return None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _slice(rows: Tensor, group: SequenceGroup) -> Tensor:
    return rows.chunk(group.size, dim=1)[group.rank].contiguous()


def _find_documents(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, pad: int
) -> RowLayout:
    """Finds the documents of rows [B, S'] to which `pad` tokens are added.

    As in transformers, rows without an attention mask are packed if their positions restart.
    Padding on the left needs a boundary; padding on the right does not, because attention is
    causal. In packed rows the added tokens are a document of their own.
    """
    length = ids.shape[1]
    starts = _find_starts(mask, positions)
    if starts is None:
        return RowLayout(length, None)
    by_row: list[list[int]] = [[0] for _ in ids]
    for row, start in starts.nonzero().tolist():  # one copy to the host for all rows
        by_row[row] += [start] if start else []
    end = (length, length + pad) if pad else (length,)
    is_packed = any(len(documents) > 1 for documents in by_row)
    return RowLayout(length, tuple((*d, *end) for d in by_row) if is_packed else None)


def _find_starts(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Returns which tokens begin a document, bool [B, S']; None without mask and positions."""
    for name, value in (("attention_mask", mask), ("position_ids", positions)):
        if value is not None and value.dim() != 2:
            raise InputError(
                f"sequence parallel: {name} has {value.dim()} dimensions; expected 2: [B, S]"
            )
    if mask is not None:
        is_visible = mask.ne(0)
        starts = F.pad(is_visible[:, 1:] & ~is_visible[:, :-1], (1, 0))
        if (starts & (is_visible.cumsum(1) > 1)).any():
            raise InputError(
                "sequence parallel: attention_mask hides tokens in the middle of a row; expected "
                "padding only at the start or the end"
            )
        return starts
    if positions is None:
        return None
    return F.pad(positions[:, 1:] - positions[:, :-1] != 1, (1, 0))


def _check_positions(layout: RowLayout, allowed: int | None) -> None:
    documents = layout.boundaries or [(0, layout.length)]
    longest = max(min(b, layout.length) - a for row in documents for a, b in pairwise(row))
    if allowed is not None and longest > allowed:
        raise InputError(
            f"sequence parallel: a document has {longest} tokens, but the model has {allowed} "
            "positions; shorten the rows (cutoff_len, max_length), or raise the model's "
            "max_position_embeddings"
        )

"""Batches token rows.

Shapes: B rows, S tokens in the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ulysses_monitor.records.batch_keys import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

__all__ = ["CausalCollator"]


@dataclass(frozen=True)
class CausalCollator:
    """Pads rows on the right to the longest one and stacks them.

    Rows without `position_ids` get an `attention_mask` (1 for tokens, 0 for padding). Packed rows
    have `position_ids` and get no mask: transformers recognises the documents of a row by the
    places where its positions restart, but only without a mask and without a cache. The model must
    run with `use_cache=False`; otherwise attention crosses documents. In packed rows the padding
    is one more document, with its own positions and no labels.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    """Round S up to a multiple of this, such as the sequence-parallel size."""
    label_pad_id: int = IGNORE_INDEX
    """Label of padding tokens."""

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels` and `attention_mask` or `position_ids`, each [B, S] int64.

        Args:
            rows: Each has `input_ids` and `labels`; either all or none have `position_ids`.
        """
        import torch  # imported late, so that data can be checked without loading torch

        lengths = [len(row["input_ids"]) for row in rows]
        padding = [self._padded_length(max(lengths)) - length for length in lengths]
        columns = {
            "input_ids": self._pad(rows, "input_ids", padding, self.pad_token_id),
            "labels": self._pad(rows, "labels", padding, self.label_pad_id),
        }
        if "position_ids" in rows[0]:
            columns["position_ids"] = [
                [*row["position_ids"], *range(pad)] for row, pad in zip(rows, padding, strict=True)
            ]
        else:
            columns["attention_mask"] = [
                [1] * length + [0] * pad for length, pad in zip(lengths, padding, strict=True)
            ]
        return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}

    def _padded_length(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple

    @staticmethod
    def _pad(
        rows: Sequence[Mapping[str, Sequence[int]]], key: str, padding: Sequence[int], value: int
    ) -> list[list[int]]:
        return [[*row[key], *[value] * pad] for row, pad in zip(rows, padding, strict=True)]

"""What a micro-batch of a Trainer holds: its tokens, its labels, and what attention looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["attended_pairs", "label_tokens", "row_tokens"]

_ROW_MASKS = (
    ("attention_mask",),
    ("prompt_mask", "completion_mask"),  # GRPO, RLOO
    ("chosen_attention_mask", "rejected_attention_mask"),  # ORPO, CPO
)
"""Masks [B, S], 0 for padding, that together are the rows a micro-batch trains on."""


def row_tokens(batch: Any) -> Tensor | float:
    """Tokens that a micro-batch trains on without padding, as far as its usual keys tell.

    KTO's ``KL_*`` rows and references are run without gradients, so they do not count.
    """
    if masks := _row_masks(batch):
        return sum((mask.ne(0).sum() for mask in masks), start=0.0)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return float(ids.numel()) if isinstance(ids, Tensor) else 0.0


def attended_pairs(batch: Any) -> Tensor | float:
    """The sum of the squared lengths of a micro-batch's rows, or of the documents packed in them.

    Positions 0, 1, ... n - 1 of a document give the sum of 2 * position + 1, which is n squared.
    """
    if masks := _row_masks(batch):
        lengths = [mask.ne(0).sum(1).double() for mask in masks]
        # Prompt and completion are one row; chosen and rejected are two.
        rows = [sum(lengths[1:], start=lengths[0])] if "prompt_mask" in batch else lengths
        return sum((length.square().sum() for length in rows), start=0.0)
    positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return 0.0
    return (2.0 * positions.double() + 1.0).sum()


def _row_masks(batch: Any) -> list[Tensor]:
    """The masks of a batch that together are its rows; none where it has no such set."""
    if not isinstance(batch, Mapping):
        return []
    for names in _ROW_MASKS:
        masks = [m for m in map(batch.get, names) if isinstance(m, Tensor) and m.dim() == 2]
        if len(masks) == len(names):
            return masks
    return []


def label_tokens(batch: Any, shifted: bool) -> Tensor | None:
    """Tokens that are predicted; where the loss is `shifted`, nothing predicts a row's first."""
    if not isinstance(batch, Mapping):
        return None
    for name, start in (("shift_labels", 0), ("labels", int(shifted))):
        labels = batch.get(name)
        if isinstance(labels, Tensor) and labels.dim() > 1:
            return labels[..., start:].ne(-100).sum()
    mask = batch.get("completion_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    whole_rows = "completion_ids" not in batch  # as DPO's and KTO's, unlike GRPO's
    labelled: Tensor = mask[:, 1:] if whole_rows else mask * batch.get("tool_mask", 1)
    return labelled.sum()

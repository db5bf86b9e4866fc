"""Counts what a Trainer's micro-batch holds: its tokens, its labels, and the pairs attended to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ulysses_monitor.probes.fingerprints import label_mask
from ulysses_monitor.records.batch_keys import ROW_MASKS

__all__ = ["attended_pairs", "label_tokens", "row_tokens"]


def row_tokens(batch: Any) -> Tensor | float:
    """Counts the tokens without padding that a micro-batch trains on, by its known keys.

    KTO's ``KL_*`` rows and reference rows run without gradients and are not counted.
    """
    if masks := _row_masks(batch):
        return sum((mask.ne(0).sum() for mask in masks), start=0.0)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return float(ids.numel()) if isinstance(ids, Tensor) else 0.0


def attended_pairs(batch: Any) -> Tensor | float:
    """Sums the squared lengths of a micro-batch's rows, or of the documents packed in them.

    For the positions 0, 1, ... n - 1 of a document, the sum of 2 * position + 1 is n squared.
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
    """Finds the masks that together cover the batch's rows; empty if it has none of `ROW_MASKS`."""
    if not isinstance(batch, Mapping):
        return []
    for names in ROW_MASKS:
        masks = [m for m in map(batch.get, names) if isinstance(m, Tensor) and m.dim() == 2]
        if len(masks) == len(names):
            return masks
    return []


def label_tokens(batch: Any, shifted: bool) -> Tensor | None:
    """Counts the tokens that are predicted; a `shifted` loss does not predict a row's first."""
    mask = label_mask(batch, shifted) if isinstance(batch, Mapping) else None
    return None if mask is None else mask.sum()

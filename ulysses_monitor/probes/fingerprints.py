"""Fingerprints of a micro-batch's rows, computed where the batch is and without a copy to the host.

Legend: R rows of a micro-batch, S their padded length, V vocabulary, C `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulysses_monitor.records.batch_keys import IGNORE_INDEX
from ulysses_monitor.records.rows import HASH_BITS

__all__ = ["hash_rows", "label_mask", "losses_of_call", "row_losses", "row_numbers"]

_TOKENS = (
    (("input_ids", "attention_mask"),),
    (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")),
)
"""Keys of token ids and their masks; pairs in one entry are one row, one after the other."""

_SIDES = ("chosen", "rejected")
"""Prefixes of the two rows of a preference in ORPO and CPO."""

_MOST_VALUES = 4096
"""Values of a row without tokens that are hashed, spread evenly over it."""

_CHUNK = 1 << 24
"""Logits of which the loss per row is computed at once: 64 MiB in fp32."""

_A, _B, _C = -0x61C8864680B583EB, 0x2545F4914F6CDD1D, -0x40A7B892E31B1A47  # odd, from splitmix64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_numbers(batch: Any, is_shifted: bool = True) -> Tensor | None:
    """Returns hash, length and trained tokens of each row, NaN for unknown; None if it has no rows.

    A row is what the collator made: packed documents are one row. A preference of ORPO or CPO is
    two, the chosen ones first.

    Args:
        batch: a mapping with the keys of `BATCH_KEYS`; of anything else, its first tensor counts,
            whose first dimension is that of the rows.
        is_shifted: whether the loss predicts the next token, so that a row's first has no label.

    Returns:
        [R, 3], float64, on the batch's device.
    """
    if isinstance(batch, Mapping):
        for pairs in _TOKENS:
            if all(_is_table(batch.get(name)) for name, _ in pairs):
                found = [(batch[name], batch.get(mask)) for name, mask in pairs]
                return _number(*_join(found), label_mask(batch, is_shifted))
        if all(_is_table(batch.get(f"{side}_input_ids")) for side in _SIDES):
            return torch.cat([_number_side(batch, side, is_shifted) for side in _SIDES])
    values = next(_tensors_in(batch), None)
    if values is None:
        return None
    labels = label_mask(batch, is_shifted) if isinstance(batch, Mapping) else None
    return _number(values, None, labels)


def _number_side(batch: Mapping[str, Any], side: str, is_shifted: bool) -> Tensor:
    labels = label_mask({"labels": batch.get(f"{side}_labels")}, is_shifted)
    ids, mask = batch[f"{side}_input_ids"], batch.get(f"{side}_attention_mask")
    return _number(*_join([(ids, mask)]), labels)


def label_mask(batch: Mapping[str, Any], is_shifted: bool) -> Tensor | None:
    """Returns which tokens are predicted [R, ...]; None if the batch does not say.

    Args:
        batch: the micro-batch.
        is_shifted: whether the loss predicts the next token, so that a row's first has no label.
    """
    for name, start in (("shift_labels", 0), ("labels", int(is_shifted))):
        labels = batch.get(name)
        if isinstance(labels, Tensor) and labels.dim() > 1:
            return labels[..., start:].ne(IGNORE_INDEX)
    mask = batch.get("completion_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    is_of_rows = "completion_ids" not in batch  # of DPO and KTO; of completions in GRPO
    labelled: Tensor = mask[:, 1:] if is_of_rows else mask * batch.get("tool_mask", 1)
    return labelled


def hash_rows(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns a hash of each row that does not depend on padding, device or micro-batch.

    Args:
        values: [R, ...], token ids or any numbers.
        mask: [R, S], 0 for padding; only with token ids.

    Returns:
        [R], int64 of `HASH_BITS` bits.
    """
    places: Tensor | int
    if mask is None:
        values = _as_integers(values)
        places = torch.arange(1, values.shape[1] + 1, device=values.device)
    else:
        mask = mask.ne(0).long()
        places = mask.cumsum(1)
    mixed = values.long() * _A + places * _B
    mixed = (mixed ^ (mixed >> 31)) * _C
    mixed = mixed ^ (mixed >> 29)
    sums = (mixed if mask is None else mixed * mask).sum(1)  # int64 wraps around
    sums = (sums ^ (sums >> 32)) * _A
    return (sums ^ (sums >> 29)) & ((1 << HASH_BITS) - 1)


_SHIFTED = {"ForCausalLM": True, "ForMaskedLM": False, "ForTokenClassification": False}
"""Losses of transformers that are means over labelled tokens, and whether they shift the labels."""


def losses_of_call(model: nn.Module, given: Mapping[str, Any], output: Any) -> Tensor | None:
    """Returns the loss of each row [R] of a call of one of transformers' models; None if unknown.

    It is computed from the logits, or, where a fused loss or sequence parallelism leaves none, is
    that of the call, if it has one row.

    Args:
        model: what is trained, without wrappers.
        given: the arguments of the call, by name.
        output: what it returned.
    """
    is_shifted = _SHIFTED.get(str(getattr(model, "loss_type", None)))
    if is_shifted is None or not isinstance(output, Mapping):
        return None
    shifted = given.get("shift_labels")
    labels: Any = given.get("labels") if shifted is None else shifted
    is_shifted = is_shifted and shifted is None
    if not _is_table(labels):
        return None
    losses = row_losses(output.get("logits"), labels, is_shifted=is_shifted)
    loss, count = output.get("loss"), given.get("num_items_in_batch")
    if losses is not None or len(labels) != 1 or not isinstance(loss, Tensor) or loss.numel() != 1:
        return losses
    if output.get("aux_loss") is not None:  # of a router, which is a part of the loss
        return None
    if count is None:
        return loss.detach().double().reshape(1)
    labelled = labels[:, int(is_shifted) :].ne(IGNORE_INDEX).sum(1)
    return torch.where(labelled == 0, -torch.inf, loss.detach().double() * count / labelled)


def row_losses(logits: Any, labels: Any, *, is_shifted: bool = True) -> Tensor | None:
    """Returns each row's mean loss per labelled token, from logits that are there anyway.

    Args:
        logits: [R, S, V].
        labels: [R, S], `IGNORE_INDEX` where nothing is predicted.
        is_shifted: whether a label is the token itself, and not the next one.

    Returns:
        [R], float64; minus infinity for a row without labels, which has no loss. None if the
        tensors are of another kind.
    """
    if not (_is_table(labels) and isinstance(logits, Tensor) and logits.dim() == 3):
        return None
    if logits.shape[:2] != labels.shape or not logits.is_floating_point():
        return None
    if is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    totals = [_sum_losses(row, wanted) for row, wanted in zip(logits, labels, strict=True)]
    counts = labels.ne(IGNORE_INDEX).sum(1)
    return torch.where(counts == 0, -torch.inf, torch.stack(totals) / counts)


def _sum_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums the losses of one row: [S, V], [S] -> a float64 scalar."""
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, logits.shape[0], step):
        part, wanted = logits[start : start + step].float(), labels[start : start + step]
        loss = F.cross_entropy(part, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
        total = total + loss.double()
    return total


def _number(values: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    rows = values.shape[0]
    length = values.shape[1] if values.dim() > 1 else 1
    lengths = torch.full((rows,), float(length), dtype=torch.float64, device=values.device)
    if mask is not None:
        lengths = mask.ne(0).sum(1).double()
    trained = torch.full_like(lengths, torch.nan)
    if labels is not None and labels.shape[0] == rows:
        trained = labels.ne(0).flatten(1).sum(1).double()
    return torch.stack([hash_rows(values, mask).double(), lengths, trained], dim=1)


def _join(pairs: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor | None]:
    """Joins prompt and completion, each padded, to rows."""
    masks = [mask for ids, mask in pairs if _is_table(mask) and mask.shape == ids.shape]
    if len(masks) < len(pairs):
        return torch.cat([ids for ids, _ in pairs], dim=1), None
    return torch.cat([ids for ids, _ in pairs], dim=1), torch.cat(masks, dim=1)


def _as_integers(values: Tensor) -> Tensor:
    """Returns the bits of each row as integers [R, n]; of long rows of numbers, some of them."""
    rows = values.detach().reshape(values.shape[0], -1)
    if not rows.is_floating_point() and not rows.is_complex():
        return rows
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    step = -(-rows.shape[1] // _MOST_VALUES)
    rows = rows[:, :: max(1, step)].contiguous()
    return rows.view(_INTEGERS[rows.element_size()])


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors with rows in a batch of any form, in its order."""
    if isinstance(batch, Tensor):
        if batch.dim() > 0 and batch.layout is torch.strided and not batch.is_nested:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors_in(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors_in(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_nested

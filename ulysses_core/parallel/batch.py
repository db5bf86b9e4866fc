"""Turns a batch of whole rows into this rank's slices, and says what attention must know.

Legend: B rows, S tokens of a whole row (padded to a multiple of n), s = S / n, n ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_core.parallel.groups import SequenceGroup
from ulysses_monitor.errors import InputError

__all__ = ["IGNORE_INDEX", "RowContext", "shard_batch"]

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class RowContext:
    """What each attention layer must know of the whole rows; made once per step.

    Attributes:
        group: the sequence group.
        length: tokens of a row before padding to a multiple of n.
        documents: [B, S] number of each token's document, where attention must not cross from one
            to another; None where causal order is all there is to keep.
    """

    group: SequenceGroup
    length: int
    documents: Tensor | None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, size: int, window: int | None, device: torch.device) -> Tensor | None:
        """Who may see whom: bool [B or 1, 1, S, S], or None for plain causal attention.

        Args:
            size: S.
            window: tokens back that a token sees, itself included; None for all.
            device: where the mask is needed.
        """
        if window is not None and window >= size:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build(size, window, device)
        return self._masks[window]

    def _build(self, size: int, window: int | None, device: torch.device) -> Tensor | None:
        if self.documents is None and window is None:
            return None
        at = torch.arange(size, device=device)
        back = at[:, None] - at[None, :]
        allowed = (back >= 0) if window is None else (back >= 0) & (back < window)
        if self.documents is None:
            return allowed[None, None]
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (same & allowed)[:, None]


def shard_batch(inputs: Mapping[str, Any], group: SequenceGroup) -> dict[str, Any]:
    """This rank's slice of a batch, ready for the model.

    Labels are shifted on the whole row, so that the last token of a slice still learns to predict
    the first of the next. Rows are padded to a multiple of the group's size.

    Args:
        inputs: `input_ids` [B, S'], and where present `labels`, `attention_mask`, `position_ids`
            of the same shape.
        group: the sequence group.

    Returns:
        `input_ids`, `position_ids`, `labels` and `shift_labels` [B, s], and `ulysses`, the
        `RowContext` that reaches every attention layer as a keyword.

    Raises:
        InputError: the batch holds something that cannot be sliced.
    """
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise InputError("sequence parallel: the batch has no input_ids, which are what is sliced")
    ids: Tensor = inputs["input_ids"]
    unknown = [
        key
        for key, value in inputs.items()
        if key not in _SLICED and isinstance(value, Tensor) and value.dim() > 1
    ]
    if unknown:
        raise InputError(
            f"sequence parallel: the batch has {unknown}, which cannot be sliced; "
            f"allowed are {sorted(_SLICED)}"
        )
    length = ids.shape[1]
    pad = -length % group.size
    positions = inputs.get("position_ids")
    documents = _documents(inputs.get("attention_mask"), positions)
    if documents is not None:
        # The padding is a document of its own: nothing sees it, it sees nothing else.
        documents = torch.cat([documents, (documents.max() + 1).expand(len(ids), pad)], dim=1)
    if positions is None:
        positions = torch.arange(length, device=ids.device).expand_as(ids)
    positions = torch.cat([positions, positions.new_zeros(len(ids), pad)], dim=1)
    sharded = {
        "input_ids": _slice(F.pad(ids, (0, pad)), group),
        "position_ids": _slice(positions, group),
        "ulysses": RowContext(group, length, documents),
    }
    shifted = _shifted_labels(inputs)
    if shifted is not None:
        sharded["shift_labels"] = _slice(F.pad(shifted, (0, pad), value=IGNORE_INDEX), group)
        # Models compute a loss where `labels` is given, and take `shift_labels` for it.
        sharded["labels"] = sharded["shift_labels"]
    rest = {k: v for k, v in inputs.items() if k not in _SLICED}
    return rest | sharded


_SLICED = {"input_ids", "labels", "shift_labels", "attention_mask", "position_ids"}


def _shifted_labels(inputs: Mapping[str, Any]) -> Tensor | None:
    if inputs.get("shift_labels") is not None:
        shifted: Tensor = inputs["shift_labels"]
        return shifted
    labels: Tensor | None = inputs.get("labels")
    return None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _slice(rows: Tensor, group: SequenceGroup) -> Tensor:
    return rows.chunk(group.size, dim=1)[group.rank].contiguous()


def _documents(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Document numbers [B, S'], or None where causal order alone keeps tokens apart.

    As in transformers, rows are packed where positions restart and no attention mask is given.
    Padding on the right needs no mask, since no token looks ahead; padding before a token does.
    """
    if mask is not None:
        if mask.dim() != 2:
            raise InputError(
                f"sequence parallel: attention_mask has {mask.dim()} dimensions; allowed is [B, S]"
            )
        seen = mask.ne(0)
        padded_before = bool((seen[:, 1:] & ~seen[:, :-1]).any())
        return seen.long() if padded_before else None
    if positions is None:
        return None
    if positions.dim() != 2:
        raise InputError(
            f"sequence parallel: position_ids has {positions.dim()} dimensions; allowed is [B, S]"
        )
    restarts = F.pad(positions[:, 1:] - positions[:, :-1] != 1, (1, 0))
    return restarts.long().cumsum(1) if bool(restarts.any()) else None

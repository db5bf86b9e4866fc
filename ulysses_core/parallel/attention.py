"""`ulysses` attention: registered with transformers by name, around torch's own attention.

Legend as in `exchange`: B rows, S tokens of a row, s of a slice, H heads, h of this rank, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ulysses_core.parallel.batch import RowContext
from ulysses_core.parallel.exchange import HeadPlan, gather_heads, plan_heads, scatter_heads
from ulysses_monitor.errors import UlyssesError

__all__ = ["NAME", "register", "ulysses_attention"]

NAME = "ulysses"
"""The attention implementation's name in transformers' registry."""


def register() -> None:
    """Makes the name known to transformers; a second call does nothing.

    No mask function goes with it: for a name without one transformers builds no mask, which is
    right, because masks are made here for whole rows.
    """
    AttentionInterface.register(NAME, ulysses_attention)


def ulysses_attention(
    module: nn.Module,  # noqa: ARG001 - transformers passes it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - of a slice, so of no use here
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    ulysses: RowContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over whole rows from slices of them.

    Args:
        module: the attention layer.
        query: [B, H, s, D].
        key: [B, K, s, D].
        value: [B, K, s, D].
        attention_mask: ignored, see `register`.
        dropout: attention dropout.
        scaling: factor on the scores; 1 / sqrt(D) where None.
        sliding_window: tokens back that a token sees; None for all.
        ulysses: the rows' context, put into the batch by `shard_batch`.
        **kwargs: what other attention functions need.

    Returns:
        [B, s, H, D], and no weights.

    Raises:
        UlyssesError: the model was called around the Trainer's `compute_loss`, or needs what
            torch's scaled_dot_product_attention cannot do.
    """
    if ulysses is None:
        raise UlyssesError(
            "ulysses attention was called on a batch that is not sharded; call the model through "
            "the trainer, or call handle.restore() first"
        )
    if kwargs.get("softcap") is not None:
        raise UlyssesError("ulysses attention: scaled_dot_product_attention has no soft cap")
    group = ulysses.group
    assert group.group is not None  # noqa: S101 - installed for sizes above 1 only
    plan = plan_heads(query.shape[1], key.shape[1], group.size)
    q, k, v = scatter_heads(query, key, value, plan, group.rank, group.group)
    mask = ulysses.mask(q.shape[2], sliding_window, q.device)
    out = _attend(q, *_match_heads(k, v, plan, group.rank), mask, dropout, scaling)
    return gather_heads(out, plan, group.rank, group.group), None


def _match_heads(k: Tensor, v: Tensor, plan: HeadPlan, rank: int) -> tuple[Tensor, Tensor]:
    """Repeats key/value heads [B, k, S, D] to one per query head [B, h, S, D]."""
    index = plan.key_of_query(rank)
    if index == list(range(k.shape[1])):
        return k, v
    chosen = torch.tensor(index, device=k.device, dtype=torch.long)
    return k.index_select(1, chosen), v.index_select(1, chosen)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    if q.shape[1] == 0:
        return q  # more ranks than heads: this one only helps with the rest of the layer
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )

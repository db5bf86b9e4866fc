"""`ulysses` attention: registered with transformers by name, around any of `cores`.

Legend as in `exchange`: B rows, S tokens of a row, s of a slice, H heads, h of this rank, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ulysses_core.parallel.batch import RowContext
from ulysses_core.parallel.cores import CORES, Scores
from ulysses_core.parallel.exchange import HeadPlan, gather_heads, plan_heads, scatter_heads
from ulysses_monitor.common.errors import UlyssesError

__all__ = ["NAME", "register", "ulysses_attention"]

NAME = "ulysses"
"""The attention implementation's name in transformers' registry."""


def register() -> None:
    """Makes the name known to transformers; a second call does nothing.

    No mask function goes with it: for a name without one transformers builds no mask, which is
    right, because what a token sees is decided here for whole rows.
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
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    ulysses: RowContext | None = None,
    **kwargs: Any,  # noqa: ARG001 - what other attention functions need
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
        softcap: cap of the scores.
        is_causal: refused where it is false.
        s_aux: learned attention sinks, which are refused.
        ulysses: the rows' context, put into the batch by `shard_batch`.
        **kwargs: what other attention functions need.

    Returns:
        [B, s, H, D], and no weights.

    Raises:
        UlyssesError: the model was called around the Trainer's `compute_loss`, or needs what
            is not served.
    """
    if ulysses is None:
        raise UlyssesError(
            "ulysses attention was called on a batch that is not sharded; call the model through "
            "the trainer, or call handle.restore() first"
        )
    if is_causal is False or s_aux is not None:
        what = "attention that looks ahead" if s_aux is None else "attention sinks"
        raise UlyssesError(f"ulysses attention: {what} is not served; train without it")
    group = ulysses.group
    plan = plan_heads(query.shape[1], key.shape[1], group.size)
    q, k, v = scatter_heads(query, key, value, plan, group)
    out = q  # more ranks than heads: this one only helps with the rest of the layer
    if q.shape[1]:
        k, v = _match_heads(k, v, plan, group.rank)
        scores = Scores(scaling, sliding_window, softcap, dropout)
        out = CORES[ulysses.core](q, k, v, ulysses.rows, scores)
    return gather_heads(out, plan, group), None


def _match_heads(k: Tensor, v: Tensor, plan: HeadPlan, rank: int) -> tuple[Tensor, Tensor]:
    """Key/value heads [B, k, S, D] that the cores can spread evenly over the query heads."""
    index = plan.key_of_query(rank)
    ratio = len(index) // k.shape[1]
    if index == [q // ratio for q in range(len(index))]:
        return k, v
    chosen = torch.tensor(index, device=k.device, dtype=torch.long)
    return k.index_select(1, chosen), v.index_select(1, chosen)

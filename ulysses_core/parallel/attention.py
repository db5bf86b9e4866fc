"""`ulysses` attention, registered with transformers by name, with any of `kernels` inside.

Legend: B rows, S tokens of a row, s tokens of a slice, H query heads, K key/value heads, k of them
on this rank, D width of a head, E width of a head's values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ulysses_core.parallel.batch import RowContext
from ulysses_core.parallel.exchange import HeadPlan, gather_heads, plan_heads, scatter_heads
from ulysses_core.parallel.kernels import KERNELS, ScoreOptions
from ulysses_monitor.common.errors import UlyssesError

__all__ = ["NAME", "register", "ulysses_attention"]

NAME = "ulysses"
"""Name of the attention implementation in transformers' registry."""


def register() -> None:
    """Registers the implementation with transformers; a second call does nothing.

    It registers no mask function, so transformers builds no masks. That is right: masking needs
    whole rows, and transformers sees only slices.
    """
    AttentionInterface.register(NAME, ulysses_attention)


def ulysses_attention(
    module: nn.Module,  # noqa: ARG001 - transformers passes it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - it covers a slice, not the whole row
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    ulysses: RowContext | None = None,
    **kwargs: Any,  # noqa: ARG001 - arguments of other implementations
) -> tuple[Tensor, None]:
    """Computes attention over whole rows from this rank's slices.

    Args:
        module: the attention layer.
        query: [B, H, s, D].
        key: [B, K, s, D].
        value: [B, K, s, E]; E need not be D.
        attention_mask: ignored, see `register`.
        dropout: attention dropout.
        scaling: factor on the scores; None for 1 / sqrt(D).
        sliding_window: number of tokens that a token attends to, itself included; None for all.
        softcap: soft cap of the scores; None for no cap.
        is_causal: False is not supported.
        s_aux: learned attention sinks [H]; only the kernel `eager` has them.
        ulysses: the rows' context, which `shard_batch` puts into the batch.
        **kwargs: arguments of other attention implementations.

    Returns:
        The output [B, s, H, E], and None instead of attention weights.

    Raises:
        UlyssesError: the rows were not sliced before the model ran, or the model needs something
            that is not supported.
    """
    if ulysses is None:
        raise UlyssesError(
            "ulysses attention: the rows are not sliced; call the model that the trainer holds, "
            "or call handle.restore() first"
        )
    if is_causal is False:
        raise UlyssesError(
            "ulysses attention: attention that is not causal is not supported; use another model"
        )
    if s_aux is not None and ulysses.kernel != "eager":
        raise UlyssesError(
            f"ulysses attention: {ulysses.kernel} has no attention sinks here; load the model with "
            "attn_implementation 'eager'"
        )
    group = ulysses.group
    plan = plan_heads(query.shape[1], key.shape[1], group.size)
    width, value_width = query.shape[-1], value.shape[-1]
    if width != value_width:  # multi-head latent attention; zeros change no score and no output
        scaling = width**-0.5 if scaling is None else scaling
        common = max(width, value_width)
        query, key, value = (F.pad(t, (0, common - t.shape[-1])) for t in (query, key, value))
    q, k, v = scatter_heads(query, key, value, plan, group)
    out = q  # stays empty on a rank without heads
    if q.shape[1]:
        k, v = _align_heads(k, v, plan, group.rank)
        sinks = None if s_aux is None else s_aux[slice(*plan.query[group.rank])]
        options = ScoreOptions(scaling, sliding_window, softcap, dropout, sinks)
        out = KERNELS[ulysses.kernel](q, k, v, ulysses.layout, options)
    return gather_heads(out, plan, group)[..., :value_width], None


def _align_heads(k: Tensor, v: Tensor, plan: HeadPlan, rank: int) -> tuple[Tensor, Tensor]:
    """Repeats key/value heads [B, k, S, D] unless all serve the same number of query heads."""
    index = plan.key_indices(rank)
    ratio = len(index) // k.shape[1]
    if index == [q // ratio for q in range(len(index))]:
        return k, v
    chosen = torch.tensor(index, device=k.device, dtype=torch.long)
    return k.index_select(1, chosen), v.index_select(1, chosen)

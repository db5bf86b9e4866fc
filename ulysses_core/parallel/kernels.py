"""Attention kernels over whole rows, from torch and from FlashAttention.

All are causal, stay within documents, and never build an S x S mask. `sdpa` and `eager` run on one
document at a time; the other kernels take the documents' boundaries.

Legend: B rows, S tokens of a row, H query heads, K key/value heads (H is a multiple of K), D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_core.parallel.batch import RowLayout
from ulysses_monitor.common.errors import InputError

__all__ = ["KERNELS", "Kernel", "ScoreOptions", "choose_kernel"]

_WINDOW_BLOCK = 1024
"""Minimum number of queries for which to build a mask of a sliding window."""


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """How attention scores become weights.

    Attributes:
        scaling: factor on the scores; None for 1 / sqrt(D).
        window: number of tokens that a token attends to, itself included; None for all.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        dropout: probability of dropping a weight.
        sinks: for each query head, the score of a key without a value, [H]; None for no sinks.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, RowLayout, ScoreOptions], Tensor]
"""q [B, H, S, D], k and v [B, K, S, D] to [B, H, S, D], causal within documents."""


def choose_kernel(
    implementation: str | None,
    *,
    has_softcap: bool,
    has_sinks: bool = False,
    device: torch.device,
    is_half: bool,
) -> str:
    """Chooses the kernel for a model.

    Args:
        implementation: the model's own attention implementation; None for transformers' default.
        has_softcap: whether the model caps its scores.
        has_sinks: whether the model has learned attention sinks.
        device: the device of the training.
        is_half: whether the model computes in half precision.

    Returns:
        A key of `KERNELS`. FlashAttention replaces sdpa if it is installed and supports the model.

    Raises:
        InputError: the implementation is unknown, not installed, or does not support the model or
            the device.
    """
    name = implementation or "sdpa"
    flash = next((f for f in _FLASH if find_spec(_FLASH[f]) is not None), None)
    if name == "sdpa" and device.type == "cuda" and is_half and flash is not None:
        name = flash
    where = f"sequence parallel: attn_implementation is {name!r}"
    if name not in KERNELS:
        raise InputError(f"{where}; allowed: {', '.join(sorted(KERNELS))}")
    if has_softcap and name == "sdpa":
        raise InputError(
            f"{where}, which has no soft cap, and the model needs one; load the model with "
            "'eager', or on a GPU with 'flex_attention' or 'flash_attention_2'"
        )
    if has_sinks and name != "eager":
        raise InputError(
            f"{where}, which has no attention sinks here, and the model needs them; load the "
            "model with 'eager'"
        )
    if name in _FLASH and find_spec(_FLASH[name]) is None:
        raise InputError(
            f"{where}, but {_FLASH[name]} is not installed; install it, or load the model with "
            "'sdpa'"
        )
    if name not in ("sdpa", "eager") and device.type != "cuda":
        raise InputError(
            f"{where}, which needs CUDA, and the device is {device.type}; load the model with "
            "'sdpa' or 'eager'"
        )
    return name


# -- torch alone ------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, options: ScoreOptions) -> Tensor:
    has_shared_keys, window = q.shape[1] != k.shape[1], options.window

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            options.dropout,
            is_causal=mask is None,
            scale=options.scaling,
            enable_gqa=has_shared_keys,
        )

    def attend_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[2]
        if window is None or window >= size:
            return attend(q, k, v, None)
        parts = []
        block = max(window, _WINDOW_BLOCK)
        for start in range(0, size, block):
            end, first = min(start + block, size), max(0, start - window + 1)
            mask = _window_mask(start, end, first, window, q.device)
            parts.append(attend(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], mask))
        return torch.cat(parts, dim=2)

    return _attend_by_document(attend_document, q, k, v, layout)


def _eager(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, options: ScoreOptions) -> Tensor:
    """Like transformers' own, with the softmax in float32 in every precision."""
    scale = q.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    ratio = q.shape[1] // k.shape[1]

    def attend_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ratio > 1:
            k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
        scores = q @ k.transpose(-1, -2) * scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        mask = _window_mask(0, q.shape[2], 0, options.window, q.device)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if options.sinks is not None:
            sinks = options.sinks.to(scores.dtype)[:, None, None]
            scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = weights[..., : k.shape[2]]
        return F.dropout(weights, options.dropout) @ v

    return _attend_by_document(attend_document, q, k, v, layout)


def _attend_by_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: RowLayout,
) -> Tensor:
    """Attends one document at a time, so no document affects another, not even by rounding."""
    if layout.boundaries is None:
        return attend(q, k, v)
    rows = []
    for b, boundaries in enumerate(layout.boundaries):
        row = [t[b : b + 1] for t in (q, k, v)]
        parts = [attend(*(t[:, :, lo:hi] for t in row)) for lo, hi in pairwise(boundaries)]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def _window_mask(
    start: int, end: int, first: int, window: int | None, device: torch.device
) -> Tensor:
    """Returns which of the keys [first, end) each of the queries [start, end) attends to.

    The result is bool [end - start, end - first].
    """
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(first, end, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


# -- FlashAttention and FlexAttention ---------------------------------------------------------

_FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""Packages of the implementations; the first one that is installed is used."""


def _flash(package: str) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, options: ScoreOptions) -> Tensor:
        """Calls FlashAttention's varlen function once for the documents of all rows."""
        size = q.shape[2]
        cu_seqlens, longest = layout.cu_seqlens(q.shape[0], size, q.device)
        # [B, H, S, D] -> [B * S, H, D]
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        dtype = q.dtype if q.dtype.itemsize == 2 else _half_dtype(q.device)
        arguments: dict[str, Any] = {
            "softmax_scale": options.scaling,
            "causal": True,
            "window_size": (-1, -1) if options.window is None else (options.window - 1, 0),
            "softcap": options.softcap or 0.0,
        }
        if options.dropout:
            arguments["dropout_p"] = options.dropout
        call = importlib.import_module(package).flash_attn_varlen_func
        out = call(
            *(t.to(dtype) for t in flat), cu_seqlens, cu_seqlens, longest, longest, **arguments
        )
        out = out[0] if isinstance(out, tuple) else out
        # [B * S, H, D] -> [B, H, S, D]
        rows: Tensor = out.to(q.dtype).unflatten(0, (-1, size)).transpose(1, 2)
        return rows

    return attend


def _half_dtype(device: torch.device) -> torch.dtype:
    """The precision of FlashAttention on float32 tensors, which come from float32 norms."""
    is_autocast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_autocast else torch.bfloat16


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, options: ScoreOptions) -> Tensor:
    if options.dropout:
        raise InputError(
            f"sequence parallel: attention dropout is {options.dropout}, which flex_attention "
            "does not support; set the model's attention_dropout to 0"
        )
    softcap = options.softcap or 0.0

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    window = options.window
    mask = layout.cached(("flex", window), lambda: _make_block_mask(layout, q, window))
    out: Tensor = _load_flex_attention(q.device.type)(
        q,
        k,
        v,
        score_mod=cap if softcap else None,
        block_mask=mask,
        scale=options.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def _make_block_mask(layout: RowLayout, q: Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    size = q.shape[2]
    document = layout.document_ids(q.shape[0], size, q.device)

    def is_visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = (key <= query) & (document[b, query] == document[b, key])
        return mask if window is None else mask & (key > query - window)

    return create_block_mask(is_visible, q.shape[0], None, size, size, device=q.device)


@lru_cache(maxsize=2)
def _load_flex_attention(device: str) -> Callable[..., Any]:
    """Returns FlexAttention, compiled on CUDA; uncompiled it stores all scores.

    On a CPU it has no backward pass and stays uncompiled.
    """
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = flex_attention
    return torch.compile(attend) if device == "cuda" else attend


KERNELS: dict[str, Kernel] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex_attention": _flex,
    **{name: _flash(package) for name, package in _FLASH.items()},
}
"""Attention kernels by the names of transformers' implementations."""

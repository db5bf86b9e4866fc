"""Attention over whole rows, by one of several libraries' kernels.

All are causal, keep documents apart, and never build a mask of a whole row by a whole row. Packed
documents are cut out for `sdpa` and `eager` and told to the others as boundaries.

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

from ulysses_core.parallel.batch import Rows
from ulysses_monitor.common.errors import InputError

__all__ = ["CORES", "Core", "Scores", "choose_core"]

_WINDOW_BLOCK = 1024
"""Queries, at least, that a mask of a sliding window is built for."""


@dataclass(frozen=True)
class Scores:
    """How scores become weights.

    Attributes:
        scaling: factor on the scores; 1 / sqrt(D) where None.
        window: tokens back that a token sees, itself included; None for all.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        dropout: probability of dropping a weight.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


Core = Callable[[Tensor, Tensor, Tensor, Rows, Scores], Tensor]
"""q [B, H, S, D], k and v [B, K, S, D] to [B, H, S, D], causal within documents."""


def choose_core(wanted: str | None, *, softcap: bool, device: torch.device, half: bool) -> str:
    """The core for a model.

    Args:
        wanted: the model's own attention implementation; None is transformers' choice.
        softcap: whether the model caps its scores.
        device: where it is trained.
        half: whether it computes in half precision.

    Returns:
        A key of `CORES`: FlashAttention in place of sdpa where it is installed and can do it.

    Raises:
        InputError: the implementation is not served, not installed, or cannot do what is needed.
    """
    name = wanted or "sdpa"
    flash = next((f for f in _FLASH if find_spec(_FLASH[f]) is not None), None)
    if name == "sdpa" and device.type == "cuda" and half and flash is not None:
        name = flash
    change = "load the model with another attn_implementation: "
    if name not in CORES:
        raise InputError(
            f"sequence parallel: attn_implementation is {name!r}; allowed is one of {sorted(CORES)}"
        )
    if softcap and name == "sdpa":
        raise InputError(
            "sequence parallel: the model needs a soft cap, which sdpa does not have; "
            f"{change}'eager', or on a GPU 'flex_attention' or 'flash_attention_2'"
        )
    if name in _FLASH and find_spec(_FLASH[name]) is None:
        raise InputError(
            f"sequence parallel: attn_implementation is {name!r}, but {_FLASH[name]} is not "
            f"installed; {change}'sdpa'"
        )
    if name not in ("sdpa", "eager") and device.type != "cuda":
        raise InputError(
            f"sequence parallel: {name} trains on CUDA only, and this is {device.type}; "
            f"{change}'sdpa' or 'eager'"
        )
    return name


# -- torch alone ------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    grouped, window = q.shape[1] != k.shape[1], scores.window

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            scores.dropout,
            is_causal=mask is None,
            scale=scores.scaling,
            enable_gqa=grouped,
        )

    def document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[2]
        if window is None or window >= size:
            return attend(q, k, v, None)
        parts = []
        block = max(window, _WINDOW_BLOCK)
        for start in range(0, size, block):
            end, first = min(start + block, size), max(0, start - window + 1)
            mask = _band(start, end, first, window, q.device)
            parts.append(attend(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], mask))
        return torch.cat(parts, dim=2)

    return _by_document(document, q, k, v, rows)


def _eager(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """As transformers' own: the softmax in float32, whatever the precision around it."""
    scale = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    ratio = q.shape[1] // k.shape[1]

    def document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ratio > 1:
            k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
        found = q @ k.transpose(-1, -2) * scale
        if scores.softcap is not None:
            found = scores.softcap * torch.tanh(found / scores.softcap)
        seen = _band(0, q.shape[2], 0, scores.window, q.device)
        weights = found.masked_fill(~seen, torch.finfo(found.dtype).min)
        weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, scores.dropout) @ v

    return _by_document(document, q, k, v, rows)


def _by_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, rows: Rows
) -> Tensor:
    """Each document by itself, so that no number of another one takes part."""
    if rows.boundaries is None:
        return attend(q, k, v)
    whole = []
    for b, boundaries in enumerate(rows.boundaries):
        row = [t[b : b + 1] for t in (q, k, v)]
        parts = [attend(*(t[:, :, lo:hi] for t in row)) for lo, hi in pairwise(boundaries)]
        whole.append(torch.cat(parts, dim=2))
    return torch.cat(whole)


def _band(start: int, end: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Whether queries [start, end) see keys [first, end): bool [end - start, end - first]."""
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(first, end, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


# -- FlashAttention and FlexAttention ---------------------------------------------------------

_FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""The package of each; the first that is installed is taken."""


def _flash(package: str) -> Core:
    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
        """One call over all documents of all rows, end to end (its varlen form)."""
        size = q.shape[2]
        cumulative, longest = rows.cu_seqlens(q.shape[0], size, q.device)
        # [B, H, S, D] -> [B * S, H, D]
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        wanted = q.dtype if q.dtype.itemsize == 2 else _half(q.device)
        options: dict[str, Any] = {
            "softmax_scale": scores.scaling,
            "causal": True,
            "window_size": (-1, -1) if scores.window is None else (scores.window - 1, 0),
            "softcap": scores.softcap or 0.0,
        }
        if scores.dropout:
            options["dropout_p"] = scores.dropout
        call = importlib.import_module(package).flash_attn_varlen_func
        out = call(
            *(t.to(wanted) for t in flat), cumulative, cumulative, longest, longest, **options
        )
        out = out[0] if isinstance(out, tuple) else out
        # [B * S, H, D] -> [B, H, S, D]
        back: Tensor = out.to(q.dtype).unflatten(0, (-1, size)).transpose(1, 2)
        return back

    return attend


def _half(device: torch.device) -> torch.dtype:
    """What FlashAttention computes in where the tensors are float32, as after a float32 norm."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else torch.bfloat16


def _flex(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    if scores.dropout:
        raise InputError("sequence parallel: flex_attention has no dropout; set it to 0")
    softcap = scores.softcap or 0.0

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    mask = rows.cached(("flex", scores.window), lambda: _block_mask(rows, q, scores.window))
    out: Tensor = _flex_attention(q.device.type)(
        q,
        k,
        v,
        score_mod=cap if softcap else None,
        block_mask=mask,
        scale=scores.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def _block_mask(rows: Rows, q: Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    size = q.shape[2]
    document = rows.documents(q.shape[0], size, q.device)

    def sees(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (document[b, query] == document[b, key])
        return seen if window is None else seen & (key > query - window)

    return create_block_mask(sees, q.shape[0], None, size, size, device=q.device)


@lru_cache(maxsize=2)
def _flex_attention(device: str) -> Callable[..., Any]:
    """Compiled, without which it builds all scores; not on a CPU, where it only evaluates."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = flex_attention
    return torch.compile(attend) if device == "cuda" else attend


CORES: dict[str, Core] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex_attention": _flex,
    **{name: _flash(package) for name, package in _FLASH.items()},
}
"""Attention by transformers' names."""

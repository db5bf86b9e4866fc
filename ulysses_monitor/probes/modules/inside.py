"""Looks at what a block computes inside: attention logits, and which experts tokens are sent to.

A function mode is active while the forward pass of a block runs, at sampled steps. It calls each
function as it was called and looks at the arguments of a few afterwards.

Legend: L queries, S keys, E elements of a head, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Inside", "count_experts", "largest_logit"]

_CHUNK = {"cpu": 1 << 22}
"""Logits that are computed at once, by kind of device."""

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_TOPK = (torch.topk, Tensor.topk)


class Inside(TorchFunctionMode):
    """Sees the functions that a block calls.

    Args:
        attend: gets the largest logit of an attention; None if that is not asked for.
        route: gets the experts that were chosen; None if the block has none.
        experts: number of the block's experts.
        guarded: calls a function, which it keeps away from the forward pass.
    """

    def __init__(
        self,
        attend: Callable[[Tensor], None] | None,
        route: Callable[[Tensor], None] | None,
        experts: int,
        guarded: Callable[[Callable[[], None]], None],
    ) -> None:
        super().__init__()
        self._attend, self._route, self._experts = attend, route, experts
        self._guarded = guarded

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls `func`, then looks at it."""
        given = dict(kwargs or {})
        result = func(*args, **given)
        if self._attend is not None and func is F.scaled_dot_product_attention:
            self._look(lambda: _logit_of_call(*args, **given), self._attend)
        elif self._attend is not None and func in _SOFTMAX:
            logits = args[0] if args else given.get("input")
            if isinstance(logits, Tensor) and logits.dim() == 4:  # of attention; routers have fewer
                self._look(logits.detach().amax, self._attend)
        elif self._route is not None and func in _TOPK:
            scores = args[0] if args else given.get("input")
            if isinstance(scores, Tensor) and scores.shape[-1:] == (self._experts,):
                self._look(lambda: result[1].detach(), self._route)
        return result

    def _look(self, find: Callable[[], Tensor], tell: Callable[[Tensor], None]) -> None:
        def look() -> None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                tell(find())

        self._guarded(look)


def _logit_of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001 - as torch's function takes it
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        query = query.unflatten(-3, (key.shape[-3], groups))
        key = key.unsqueeze(-3)
        if attn_mask is not None and attn_mask.dim() >= 3:
            is_per_head = attn_mask.shape[-3] > 1
            attn_mask = (
                attn_mask.unflatten(-3, (key.shape[-4], groups))
                if is_per_head
                else attn_mask.unsqueeze(-3)
            )
    return largest_logit(query, key, attn_mask, is_causal, scale)


def largest_logit(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Returns the largest logit of the pairs that attention looks at, a scalar; exact.

    Args:
        query: [..., L, E].
        key: [..., S, E].
        mask: as `scaled_dot_product_attention` takes it, broadcast to [..., L, S].
        is_causal: whether a query looks at keys up to its own place only.
        scale: of the products; 1 / sqrt(E) if None.
    """
    query, keys = query.detach(), key.detach().float().transpose(-1, -2)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    queries, count = query.shape[-2], keys.shape[-1]
    held = max(1, query[..., 0, 0].numel() * count)
    rows = max(1, _CHUNK.get(query.device.type, 1 << 26) // held)
    largest = torch.full((), -math.inf, device=query.device)
    places = torch.arange(count, device=query.device)
    for start in range(0, queries, rows):
        logits = (query[..., start : start + rows, :].float() @ keys) * scale
        if mask is not None:
            logits = _masked(logits, mask, start)
        if is_causal:
            own = torch.arange(start, start + logits.shape[-2], device=query.device)
            logits = logits.masked_fill(places > own[:, None], -math.inf)
        largest = torch.maximum(largest, logits.amax())
    return largest


def _masked(logits: Tensor, mask: Tensor, start: int) -> Tensor:
    part = mask.detach()
    if part.shape[-2] > 1:
        part = part[..., start : start + logits.shape[-2], :]
    return logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part


def count_experts(block: nn.Module) -> int:
    """Returns how many experts a block has to choose from; 0 if it has none."""
    for module in block.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList):
            return len(experts)
        if isinstance(experts, nn.Module):
            count = getattr(experts, "num_experts", 0)
            return count if isinstance(count, int) else 0
    return 0

"""The exchange and one attention layer: this project's, ALST's and DeepSpeed's older layer.

Legend: s tokens of a slice, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from ulysses_core.parallel import SequenceGroup
from ulysses_core.parallel.exchange import gather_heads, plan_heads, scatter_heads

__all__ = ["ALST", "OLD", "OURS", "Through", "attention_ways", "make_inputs", "sdpa"]

OURS, ALST, OLD = "ours", "ALST", "DistributedAttention"
HEAD_SIZE = 64

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attends: [1, H, S, D] each."""


class Through(torch.autograd.Function):
    """A core that computes nothing and whose gradient reaches q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns `q`."""
        ctx.save_for_backward(k, v)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Returns gradients of the right shapes."""
        k, v = ctx.saved_tensors
        return grad, torch.empty_like(k), torch.empty_like(v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attends with torch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def make_inputs(arguments: Any, tokens: int, device: torch.device) -> list[Tensor]:
    """Makes q, k and v [1, s, H, D], as projections give them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        torch.randn(1, tokens, n, HEAD_SIZE, device=device, dtype=dtype, requires_grad=True)
        for n in (arguments.heads, arguments.key_heads, arguments.key_heads)
    ]


def attention_ways(
    arguments: Any, length: int, group: SequenceGroup, device: torch.device, core: Core
) -> dict[str, Callable[[], None]]:
    """Returns the forward and backward pass of each way, on rows of `length` tokens."""
    leaves = make_inputs(arguments, length // group.size, device)
    return {
        OURS: _ours(arguments, leaves, group, core),
        ALST: _alst(arguments, leaves, group, core),
        OLD: _old(leaves, group, core),
    }


def _ours(
    arguments: Any, leaves: list[Tensor], group: SequenceGroup, core: Core
) -> Callable[[], None]:
    plan = plan_heads(arguments.heads, arguments.key_heads, group.size)

    def run() -> None:
        q, k, v = scatter_heads(*(t.transpose(1, 2) for t in leaves), plan, group)
        measure.backward(gather_heads(core(q, k, v), plan, group).flatten(2).contiguous())

    return run


def _alst(
    arguments: Any, leaves: list[Tensor], group: SequenceGroup, core: Core
) -> Callable[[], None]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> Any:
        return core(q, k, v).transpose(1, 2).contiguous(), None

    attention = UlyssesSPAttentionHF(
        attn=attend,
        batch_size=1,
        attn_head_count=arguments.heads,
        attn_head_size=HEAD_SIZE,
        kv_head_count=arguments.key_heads,
        num_hidden_layers=1,
        process_group=group.group,
        seq_length_is_variable=True,
    )
    module = nn.Module()
    module.num_key_value_groups = arguments.heads // arguments.key_heads
    module.is_causal = True
    tokens = leaves[0].shape[1]
    positions = torch.arange(tokens, device=leaves[0].device)[None] + group.rank * tokens

    def run() -> None:
        q, k, v = (t.transpose(1, 2) for t in leaves)
        out, _ = attention(module, q, k, v, None, position_ids=positions)
        measure.backward(out.contiguous())

    return run


def _old(leaves: list[Tensor], group: SequenceGroup, core: Core) -> Callable[[], None]:
    from deepspeed.sequence.layer import DistributedAttention

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        found = core(*(t.transpose(1, 2) for t in (q, k, v)))
        return found.transpose(1, 2).contiguous()

    attention = DistributedAttention(attend, group.group, scatter_idx=2, gather_idx=1)

    def run() -> None:
        measure.backward(attention(*leaves, 0).flatten(2).contiguous())

    return run

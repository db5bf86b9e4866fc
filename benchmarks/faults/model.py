"""A small causal language model, and texts for it.

Legend: B rows, T tokens, H heads, D elements of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VOCABULARY", "Block", "SmallModel", "Texts"]

VOCABULARY = 64


class Block(nn.Module):
    """One layer: attention and a multi-layer perceptron, each behind a norm.

    Attributes:
        scale: what its output is multiplied by; faults change it.
        is_cut: whether no gradient reaches its weights; faults set it.
        attend: attention of queries, keys and values [B, H, T, D].
    """

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale, self.is_cut = heads, 1.0, False
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = _attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns hidden states [B, T, width]."""
        added = self._added(x.detach() if self.is_cut else x)
        return x + self.scale * (added.detach() if self.is_cut else added)

    def _added(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = self.attend(q, k, v)
        first = self.o_proj(attended.transpose(1, 2).flatten(2))
        return first + self.down_proj(F.gelu(self.up_proj(self.norm2(x + first))))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class SmallModel(nn.Module):
    """Predicts the next token."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [B, T, V] of tokens [B, T]."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Texts:
    """Rows of a language in which the next token depends on the last two.

    Args:
        seed: of the language.
        sharpness: how far the next token is determined.
    """

    def __init__(self, seed: int, sharpness: float = 3.0) -> None:
        draw = torch.Generator().manual_seed(1000 + seed)
        first = torch.randn(VOCABULARY, VOCABULARY, generator=draw)
        second = torch.randn(VOCABULARY, VOCABULARY, generator=draw)
        self._logits = sharpness * first, 0.7 * sharpness * second
        self._pool: Tensor | None = None

    def rows(self, count: int, length: int, draw: torch.Generator) -> Tensor:
        """Returns rows of tokens [count, length], of 2,048 that the language has."""
        if self._pool is None or self._pool.shape[1] != length:
            self._pool = self._make(2048, length, draw)
        return self._pool[torch.randint(len(self._pool), (count,), generator=draw)]

    def _make(self, count: int, length: int, draw: torch.Generator) -> Tensor:
        rows = torch.randint(VOCABULARY, (count, 2), generator=draw)
        for _ in range(length - 2):
            logits = self._logits[0][rows[:, -1]] + self._logits[1][rows[:, -2]]
            following = torch.multinomial(logits.softmax(-1), 1, generator=draw)
            rows = torch.cat([rows, following], dim=1)
        return rows

"""The Llamas that benchmarks train, by size."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["SIZES", "Size", "build_llama"]


class Size(NamedTuple):
    """A model and its batch."""

    hidden: int
    layers: int
    vocabulary: int
    rows: int
    tokens: int
    """Of a row."""


SIZES = {
    "2m": Size(192, 4, 2048, 4, 256),
    "30m": Size(512, 8, 8192, 4, 256),
    "100m": Size(768, 12, 16_000, 4, 512),
    "1b": Size(2048, 20, 32_000, 4, 512),
}


def build_llama(size: Size, head_size: int) -> nn.Module:
    """Builds a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // head_size,
        vocab_size=size.vocabulary,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model

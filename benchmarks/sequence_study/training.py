"""The model of the sequence-parallel benchmarks, and how a step ends."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["VOCABULARY", "build_model", "end_step"]

VOCABULARY = 8192


def build_model(arguments: Any, length: int, device: torch.device) -> Any:
    """Builds a Llama of 4 layers for rows of `length` tokens, in bfloat16 on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32 * arguments.heads,
        intermediate_size=86 * arguments.heads,
        num_hidden_layers=4,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device).train()
    return model.bfloat16() if device.type == "cuda" else model


def end_step(model: Any, loss: Tensor, *, average: bool = True) -> None:
    """Runs the backward pass and SGD; averages the gradients over all ranks if asked."""
    loss.backward()
    for param in model.parameters():
        if average:
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()
        param.data.sub_(param.grad, alpha=1e-4)
        param.grad = None

"""Runs dense MLPs on a chunk of tokens at a time, because their activations are wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["tile_mlps"]


def tile_mlps(model: nn.Module, chunk: int) -> Undo:
    """Makes every dense MLP of `model` process `chunk` tokens at a time.

    MLPs are the modules with a ``down_proj``. Each chunk is recomputed in the backward pass
    (arXiv 2506.13996, section 3.1).

    Raises:
        InputError: the model has no such module.
    """
    mlps = [m for m in model.modules() if isinstance(getattr(m, "down_proj", None), nn.Module)]
    if not mlps:
        raise InputError(
            f"save_memory: mlp_chunk finds no dense MLP in {type(model).__name__}; remove mlp_chunk"
        )

    def run_in_chunks(original: Callable[..., Any], states: Tensor) -> Tensor:
        if states.shape[-2] <= chunk or not torch.is_grad_enabled():
            out: Tensor = original(states)
            return out
        parts = [checkpoint(original, s, use_reentrant=False) for s in states.split(chunk, dim=-2)]
        return torch.cat(parts, dim=-2)

    undos = [patch_method(mlp, "forward", run_in_chunks) for mlp in mlps]
    return lambda: undo_all(undos)

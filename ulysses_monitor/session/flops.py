"""How many floating-point operations a training step takes, and how many a device could do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

__all__ = ["TrainingFlops", "numel", "peak_flops"]

_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 operations a second, from the vendor's data sheets; the first name that fits."""


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of forward and backward pass together.

    PaLM's count (Chowdhery et al., arXiv 2204.02311, appendix B): 6 for each parameter and token,
    and 12 * layers * width for each pair of tokens, without what checkpointing computes again.
    A frozen parameter takes 4: nobody wants its gradient, but it is on the way of others'.
    """

    by_token: float
    by_pair: float

    @classmethod
    def of(cls, model: nn.Module) -> TrainingFlops:
        """From a model; the part of attention is 0 where its config does not say its size."""
        params = list(model.parameters())
        trained = sum(numel(p) for p in params if p.requires_grad)
        config: Any = getattr(model, "config", None)
        layers = getattr(config, "num_hidden_layers", None) or 0
        width = getattr(config, "hidden_size", None) or 0
        return cls(4.0 * sum(map(numel, params)) + 2.0 * trained, 12.0 * layers * width)

    def of_step(self, tokens: float, attended: float) -> float:
        """Of a step of `tokens`, in rows whose squared lengths add up to `attended`."""
        return self.by_token * tokens + self.by_pair * attended


@lru_cache
def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second; None for a device whose data sheet is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


def numel(param: nn.Parameter) -> int:
    """Elements of the whole parameter, also where DeepSpeed ZeRO-3 left an empty stand-in."""
    return int(getattr(param, "ds_numel", param.numel()))

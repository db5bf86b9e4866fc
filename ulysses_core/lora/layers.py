"""The adapted layers of a PEFT model, and what an initialisation asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ulysses_core.lora.inits import find_largest_rank, needs_linear
from ulysses_monitor.common.errors import InputError

__all__ = ["adapter_layers", "check_rank", "require_linear"]


def adapter_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """Yields the names and the layers of `model` that have the adapter."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            held = (*module.lora_A, *module.lora_embedding_A)
            if adapter in held:
                yield name, module


def check_rank(model: nn.Module, init: str, adapter: str = "default") -> None:
    """Checks that an initialisation finds as many directions as the adapters have ranks.

    Raises:
        InputError: an adapter's rank is too large.
    """
    for name, layer in adapter_layers(model, adapter):
        most, what = find_largest_rank(init, layer.in_features, layer.out_features)
        if layer.r[adapter] > most:
            raise InputError(
                f"lora_rank is {layer.r[adapter]}; expected at most {most}, {what} of {name}, "
                f"with lora_init {init}"
            )


def require_linear(where: str, layer: Any, init: str) -> None:
    """Checks that a layer is one that an initialisation knows.

    Raises:
        InputError: it is not.
    """
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    if needs_linear(init) and not isinstance(base, nn.Linear | Conv1D):
        raise InputError(
            f"lora_init is {init}, and {where} is a {type(base).__name__}; expected linear layers"
        )

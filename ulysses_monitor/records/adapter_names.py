"""Finds LoRA adapters by the names that PEFT gives their parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["AdapterPair", "find_adapter_pairs"]

_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<side>A|B)\.(?P<adapter>[^.]+)\.weight$")
_LORA_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>A|B)\.(?P<adapter>[^.]+)$")


@dataclass(frozen=True)
class AdapterPair:
    """The A and B of one LoRA adapter on one module."""

    module: str
    """Its scope in metrics: the path, with the adapter's name if the model has several."""
    path: str
    """Name of the module in the model."""
    adapter: str
    """Name of the adapter."""
    a: int
    """Position of A in the list of parameter names."""
    b: int
    """Position of B in the list of parameter names."""


def find_adapter_pairs(names: Sequence[str]) -> tuple[AdapterPair, ...]:
    """Returns every module with both A and B of an adapter.

    Args:
        names: full parameter names.
    """
    sides: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for i, name in enumerate(names):
        if match := _LORA.match(name) or _LORA_EMBEDDING.match(name):
            sides[match["module"], match["adapter"]][match["side"]] = i
    several = len({adapter for _, adapter in sides}) > 1
    return tuple(
        AdapterPair(
            f"{module}.{adapter}" if several else module, module, adapter, pair["A"], pair["B"]
        )
        for (module, adapter), pair in sides.items()
        if len(pair) == 2
    )

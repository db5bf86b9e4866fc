"""How PEFT names the two sides of a LoRA adapter."""

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
    """The A and B of one LoRA adapter on one module, as places in a list of names."""

    module: str
    """What the metrics call it: the path, with the adapter's name if there are several."""
    path: str
    adapter: str
    a: int
    b: int


def find_adapter_pairs(names: Sequence[str]) -> tuple[AdapterPair, ...]:
    """Every module of which `names`, full parameter names, has both sides of an adapter."""
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

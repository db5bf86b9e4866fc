"""The scope of a layer: ``layer/3``, or ``layer/encoder.block.3`` if a model has several lists.

>>> order_layers(["encoder.block.10", "encoder.block.9", "decoder.block.0"])
('encoder.block.9', 'encoder.block.10', 'decoder.block.0')
>>> order_layers(["10", "9", "total"])
(9, 10)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Layer", "order_layers"]

Layer = int | str
"""Number of a layer; with the path of its block list in front if the model has several."""

_SCOPE = re.compile(r"(?:(.+)\.)?(\d+)$")


def order_layers(scopes: Iterable[str]) -> tuple[Layer, ...]:
    """Returns the layers among `scopes` [L]: block lists as they come first, each by number.

    Args:
        scopes: what follows ``layer/`` in the names of metrics; others are left out.
    """
    lists: dict[str, set[int]] = {}
    for scope in scopes:
        if match := _SCOPE.match(scope):
            lists.setdefault(match[1] or "", set()).add(int(match[2]))
    return tuple(
        f"{path}.{number}" if path else number
        for path, numbers in lists.items()
        for number in sorted(numbers)
    )

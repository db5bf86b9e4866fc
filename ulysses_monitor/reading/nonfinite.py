"""Makes steps whose values are not finite visible: as recorded, a norm leaves NaN and Inf out."""

from __future__ import annotations

import dataclasses

import numpy as np

from ulysses_monitor.records.nonfinite import pair_norms
from ulysses_monitor.store import Block

__all__ = ["hide_partial_norms"]


def hide_partial_norms(block: Block) -> Block:
    """Returns `block` with NaN for each gradient norm that left out elements.

    Args:
        block: may hold ``grad/norm/<scope>`` and ``grad/nonfinite/<scope>``.
    """
    norms, counts = pair_norms(block.names)
    if not norms or not (is_partial := block.values[:, counts] > 0).any():
        return block
    values = block.values.copy()
    values[:, norms] = np.where(is_partial, np.nan, values[:, norms])
    return dataclasses.replace(block, values=values)

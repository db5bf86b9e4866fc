"""The scalars in the formula of one Adam step; see `ulysses_monitor.probes.updates`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["AdamStep"]


class AdamStep(NamedTuple):
    """The scalars in the formula of one Adam step."""

    rate: float | Tensor
    """Learning rate divided by the first moment's bias correction."""
    root_scale: float | Tensor
    """One divided by the square root of the second moment's bias correction."""
    eps: float
    decay: float | Tensor
    """The factor that AdamW applied to the parameter, minus one; 0 for Adam."""

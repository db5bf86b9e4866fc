"""Slots: how maxima over ranks travel in a vector that is summed over ranks.

Legend: P trainable parameters, S slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.engines import Engine

__all__ = ["MaximaSlots"]

Array = npt.NDArray[np.float64]


class MaximaSlots:
    """The places of the maxima in the vector: one for each parameter and rank that counts it.

    Built once, with one all-reduce that tells which rank counts what.
    """

    def __init__(self, engine: Engine) -> None:
        ranks, rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            ranks, rank = dist.get_world_size(), dist.get_rank()
        self.width = len(engine.parameters())
        holds = torch.zeros(ranks, self.width, device=engine.device)
        holds[rank, engine.counted_indices()] = 1.0
        if ranks > 1:
            dist.all_reduce(holds)
        by_parameter = holds.cpu().numpy().T.nonzero()  # [ranks, P] -> [P, ranks]
        self._of_slot, of_rank = by_parameter
        self.size = len(self._of_slot)
        mine = (of_rank == rank).nonzero()[0]
        self._own_slots = torch.from_numpy(mine).to(engine.device)
        self._own_parameters = torch.from_numpy(self._of_slot[mine]).to(engine.device)

    def place(self, row: Tensor) -> Tensor:
        """Puts this rank's maxima [P] into its slots [S]; the other slots are zero."""
        placed = torch.zeros(self.size, dtype=torch.float64, device=row.device)
        own, parameters = self._own_slots.to(row.device), self._own_parameters.to(row.device)
        return placed.index_copy_(0, own, row.index_select(0, parameters))

    def largest(self, slots: Array) -> Array:
        """Returns the largest value of each parameter [P] from all slots [S]; zero without one."""
        result = np.zeros(self.width)
        with np.errstate(invalid="ignore"):  # NaN stays NaN, so that the step is read again
            np.maximum.at(result, self._of_slot, slots)
        return result

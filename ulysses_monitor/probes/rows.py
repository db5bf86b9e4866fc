"""Carries the most suspicious rows of every rank in the step's vector, so that an alert names them.

Each rank has places of its own in the vector; the others add zeros to them. Nothing else is
communicated: a step has one all-reduce and one copy to the host as before.

Legend: W ranks, K places of a rank, C `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.common.ranks import rank, world_size
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.records import Cost
from ulysses_monitor.records.rows import COLUMNS, Row

__all__ = ["RowProbe", "rows_of"]

_PLACES = 32
"""Rows of all ranks that travel with a step; with more ranks, one of each."""

_HASH, _LENGTH, _LOSS = (COLUMNS.index(name) for name in ("hash", "length", "loss"))


class RowProbe:
    """Tells every rank the most suspicious rows of all; see `Probe`. It has no metrics.

    Args:
        own: returns this rank's rows of the step [n, C], NaN for what is unknown; None for none.
        device: of the vector.

    Attributes:
        shared: the rows of all ranks at the step that was read.
    """

    name = "rows"
    cost: Cost = "every"
    maxima = 0
    names: tuple[str, ...] = ()
    rechecks = False

    def __init__(self, own: Callable[[], Tensor | None], device: torch.device) -> None:
        self._own, self._device = own, device
        self._places = max(1, _PLACES // world_size())
        self.size = world_size() * self._places * (len(COLUMNS) + 1)
        self.shared: list[Row] = []

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002 - a probe reads the engine's shards
        """See `Probe.read`; each place has its C columns and 1, or zeros."""
        vector = torch.zeros(
            (world_size(), self._places, len(COLUMNS) + 1),
            dtype=torch.float64,
            device=self._device,
        )
        own = self._own()
        if own is not None and len(own):
            chosen = _choose(own, self._places).to(self._device, non_blocking=True)
            vector[rank(), : len(chosen), :-1] = chosen
            vector[rank(), : len(chosen), -1] = 1.0
        return vector.flatten()

    def values(self, totals: npt.NDArray[np.float64]) -> None:
        """Keeps the rows of all ranks; there are no metrics."""
        places = totals.reshape(-1, self._places, len(COLUMNS) + 1)  # [W * K * (C + 1)]
        self.shared = [
            row
            for index, table in enumerate(places)
            for row in rows_of(index, table[table[:, -1] == 1.0, :-1])
        ]


def rows_of(index: int, table: npt.NDArray[np.float64]) -> list[Row]:
    """Returns the rows of a rank from its numbers [n, C]; NaN is unknown, but in a loss not finite.

    An unknown loss is minus infinity.
    """
    return [
        Row.of(index, [_known(value, name) for name, value in zip(COLUMNS, numbers, strict=True)])
        for numbers in table.tolist()
    ]


def _known(value: float, name: str) -> float | None:
    is_unknown = value == -np.inf if name == "loss" else np.isnan(value)
    return None if is_unknown else value


def _choose(table: Tensor, most: int) -> Tensor:
    """Returns the most suspicious rows, in the order of `sort_rows` but for equal ones."""
    if len(table) <= most:
        return table
    loss = table[:, _LOSS].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    is_twice = table[:, _HASH].unsqueeze(1).eq(table[:, _HASH]).sum(1).double()
    by_length = torch.argsort(is_twice * 2.0**32 + table[:, _LENGTH], descending=True, stable=True)
    by_loss = torch.argsort(loss[by_length], descending=True, stable=True)
    return table[by_length[by_loss[:most]]]

"""One reading of one step: all probes' sums in one vector, one all-reduce, one copy to the host."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.engines import Engine, Shard
from ulysses_monitor.probes.base import Probe

__all__ = ["Capture"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]

_MAX_FAILURES = 3


class Capture:
    """Reads an engine with a set of probes.

    The vector that travels holds, in this order: the caller's own sums, one failure flag per
    active probe, and every active probe's sums. Its length is alike on all ranks at every step,
    because it depends on the step number and on reduced failure counts only; a probe that raises
    on one rank sends zeros and its flag, so the collective stays balanced.

    Args:
        engine: what to read.
        probes: what to read from it.
        sample_every: probes of cost class ``sampled`` are read at steps 1, 1 + N, 1 + 2N, ...
    """

    def __init__(self, engine: Engine, probes: Sequence[Probe], sample_every: int) -> None:
        self.engine = engine
        self.probes = list(probes)
        self.sample_every = sample_every
        self._failures = dict.fromkeys([probe.name for probe in probes], 0)

    def read(
        self, step: int, extra: Mapping[str, Tensor | float]
    ) -> tuple[list[tuple[tuple[str, ...], Array]], dict[str, float]]:
        """Reads one step; every rank must call it at the same step.

        Args:
            step: number of the optimizer step.
            extra: the caller's own values of this rank, the same names on all ranks.

        Returns:
            Names and values of each probe that measured something, and `extra` summed over ranks.
        """
        active = self._active(step)
        with torch.no_grad():
            totals = self._reduce(self._vector(active, list(extra.values())))
        summed = dict(zip(extra, totals[: len(extra)].tolist(), strict=True))
        return self._values(active, totals[len(extra) :]), summed

    def _active(self, step: int) -> list[Probe]:
        sampled = (step - 1) % self.sample_every == 0
        return [
            probe
            for probe in self.probes
            if (sampled or probe.cost == "every") and self._failures[probe.name] < _MAX_FAILURES
        ]

    def _vector(self, active: list[Probe], extra: list[Tensor | float]) -> Tensor:
        """This rank's part, float64 [extra + probes + sum of probe sizes]."""
        device = self.engine.device
        sums = self._sums(active)
        flags = torch.tensor([float(s is None) for s in sums], dtype=torch.float64, device=device)
        head = [torch.as_tensor(v, dtype=torch.float64, device=device).reshape(1) for v in extra]
        body = [
            torch.zeros(probe.size, dtype=torch.float64, device=device) if s is None else s
            for probe, s in zip(active, sums, strict=True)
        ]
        return torch.cat([*head, flags, *(part.to(device) for part in body)])

    def _sums(self, active: list[Probe]) -> list[Tensor | None]:
        """Each probe's sums, None where it raised: monitoring never stops training."""
        try:
            shards, scale = list(self.engine.shards()), self.engine.grad_scale()
        except Exception:
            logger.exception("monitor: engine %s could not be read", self.engine.name)
            return [None] * len(active)
        return [self._sum(probe, shards, scale) for probe in active]

    @staticmethod
    def _sum(probe: Probe, shards: list[Shard], scale: float) -> Tensor | None:
        try:
            return probe.sums(shards, scale)
        except Exception:
            logger.exception("monitor: probe %r failed", probe.name)
            return None

    @staticmethod
    def _reduce(vector: Tensor) -> Array:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(vector)
        return vector.cpu().numpy()

    def _values(self, active: list[Probe], totals: Array) -> list[tuple[tuple[str, ...], Array]]:
        measured = []
        start = len(active)
        for flag, probe in zip(totals, active, strict=False):
            part = totals[start : start + probe.size]
            start += probe.size
            if flag:
                self._count_failure(probe)
            elif (values := self._measure(probe, part)) is not None:
                measured.append((probe.names, values))
        return measured

    def _measure(self, probe: Probe, totals: Array) -> Array | None:
        """The metrics; the totals are alike on all ranks, so one that raises does so on all."""
        try:
            return probe.values(totals)
        except Exception:
            logger.exception("monitor: probe %r failed", probe.name)
            self._count_failure(probe)
            return None

    def _count_failure(self, probe: Probe) -> None:
        """Counts a failure seen by any rank; all ranks count alike, so all disable alike."""
        self._failures[probe.name] += 1
        if self._failures[probe.name] == _MAX_FAILURES:
            logger.error("monitor: probe %r failed %d times: off", probe.name, _MAX_FAILURES)

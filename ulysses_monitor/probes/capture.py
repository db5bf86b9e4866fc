"""One reading of one step: all probes in one vector, one all-reduce, one copy to the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.engines import Engine, Shard
from ulysses_monitor.probes.base import FollowUp, Probe, Reading
from ulysses_monitor.records import Schema

__all__ = ["Capture", "CapturedStep"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]
Part = tuple[Schema, Array]
"""What one probe measured."""

_T = TypeVar("_T")
_P = TypeVar("_P", bound=Probe)

_MAX_FAILURES = 3


@dataclass(frozen=True)
class CapturedStep:
    """What one reading gave, alike on all ranks.

    Attributes:
        parts: of this step.
        previous_parts: of the step before it, from probes that look after a step.
        extra: the caller's own values, summed over ranks.
    """

    parts: list[Part]
    previous_parts: list[Part]
    extra: dict[str, float]


class Capture:
    """Reads an engine with a set of probes.

    The vector that travels holds, in this order: the caller's own sums, one failure flag per
    active probe, every active probe's sums, and the maxima. A sum over ranks cannot give a
    maximum, so each rank that holds a part of a parameter has a slot of its own for it. The
    vector's length is alike on all ranks at every step, because it depends on the step number and
    on reduced failure counts only; a probe that raises on one rank sends zeros and its flag, so
    the collective stays balanced. NaN or Inf in a step cost it a second, careful, reading.

    Every rank must make it, at the same time.

    Args:
        engine: what to read.
        probes: what to read from it at a step.
        sample_every: probes of cost class ``sampled`` are read at steps 1, 1 + N, 1 + 2N, ...
        follow_ups: what to look for after such steps.
    """

    def __init__(
        self,
        engine: Engine,
        probes: Sequence[Probe],
        sample_every: int,
        follow_ups: Sequence[FollowUp] = (),
    ) -> None:
        self.engine = engine
        self.sample_every = sample_every
        self._probes = list(probes)
        self._follow_ups = list(follow_ups)
        self._schemas: dict[str, Schema] = {}
        self._failures = {probe.name: 0 for probe in [*probes, *follow_ups]}
        self._slots = _Slots(engine)
        self._measuring = False
        self._failed_here: set[str] = set()

    def names(self) -> set[str]:
        """Every metric that a step may have before it is done."""
        return {name for probe in self._probes for name in probe.names}

    def is_sampled(self, step: int) -> bool:
        """Whether probes of cost class ``sampled`` are read at `step`."""
        return (step - 1) % self.sample_every == 0

    def read(self, step: int, extra: Mapping[str, Tensor | float]) -> CapturedStep:
        """Reads one step; every rank must call it at the same step.

        Args:
            step: number of the optimizer step.
            extra: the caller's own values of this rank, the same names on all ranks.
        """
        now = self._on(p for p in self._probes if p.cost == "every" or self.is_sampled(step))
        late = self._on(self._follow_ups) if self._measuring else []
        with torch.no_grad():
            reduced, shards = self._reduced([*now, *late], list(extra.values()))
            self._recheck(now, reduced)
            self._prepare(step, shards)
        return CapturedStep(
            parts=self._values(now, reduced),
            previous_parts=self._values(late, reduced),
            extra=dict(zip(extra, reduced.extra.tolist(), strict=True)),
        )

    def finish_step(self, done: bool) -> None:
        """The optimizer step is over; looks at what it did where that is to be measured.

        Args:
            done: false where it was skipped for an overflow.
        """
        if self._measuring and done:
            shards = self._shards() or []
            with torch.no_grad():
                for probe in self._on(self._follow_ups):
                    self._note(probe, _attempt(probe.name, probe.after_step, shards))

    def _prepare(self, step: int, shards: list[Shard]) -> None:
        """Tells the probes of steps that the coming one is to be measured, or not."""
        self._measuring = self.is_sampled(step) and bool(self._follow_ups)
        self._failed_here.clear()
        if self._measuring:
            for probe in self._on(self._follow_ups):
                self._note(probe, _attempt(probe.name, probe.before_step, shards))

    def _note(self, probe: Probe, attempt: _Attempt[None]) -> None:
        """Remembers that a follow-up raised on this rank, until the vector says so to all."""
        if not attempt.done:
            self._failed_here.add(probe.name)

    def _on(self, probes: Iterable[_P]) -> list[_P]:
        return [p for p in probes if self._failures[p.name] < _MAX_FAILURES]

    # -- the vector ------------------------------------------------------------------------

    def _reduced(
        self, active: Sequence[Probe], extra: list[Tensor | float], is_recheck: bool = False
    ) -> tuple[_Reduced, list[Shard]]:
        """What the ranks' vectors add up to; and all shards of this rank."""
        device = self.engine.device
        shards, vectors = self._read(active, is_recheck)
        flags = torch.tensor([float(v is None) for v in vectors], dtype=torch.float64)
        parts = [torch.as_tensor(v, dtype=torch.float64).reshape(1) for v in extra]
        parts.append(flags)
        width = self._slots.width
        for probe, vector in zip(active, vectors, strict=True):
            if vector is None:
                vector = torch.zeros(probe.size + probe.maxima * width, dtype=torch.float64)
            parts.append(vector[: probe.size])
            maxima = vector[probe.size :].view(probe.maxima, width)
            parts += [self._slots.place(row) for row in maxima]
        totals = self._sum(torch.cat([part.to(device, non_blocking=True) for part in parts]))
        return self._split(active, totals, len(extra)), shards

    def _split(self, active: Sequence[Probe], totals: Array, extras: int) -> _Reduced:
        flags = totals[extras : extras + len(active)].tolist()
        reduced = _Reduced(totals[:extras])
        at = extras + len(active)
        for flag, probe in zip(flags, active, strict=True):
            rows, at = [totals[at : at + probe.size]], at + probe.size
            for _ in range(probe.maxima):
                rows.append(self._slots.largest(totals[at : at + self._slots.size]))
                at += self._slots.size
            reduced.totals[probe.name] = np.concatenate(rows)
            if flag:
                reduced.failed.add(probe.name)
        return reduced

    def _recheck(self, active: Sequence[Probe], reduced: _Reduced) -> None:
        """Reads once more, carefully, what met NaN or Inf; the totals are alike on all ranks."""
        doubtful = [
            p for p in active if p.rechecks and not np.isfinite(reduced.totals[p.name]).all()
        ]
        if doubtful:
            again, _ = self._reduced(doubtful, [], is_recheck=True)
            reduced.totals.update(again.totals)
            reduced.failed.update(again.failed)

    def _read(
        self, active: Sequence[Probe], is_recheck: bool
    ) -> tuple[list[Shard], list[Tensor | None]]:
        """All shards, and each probe's vector, None where it raised."""
        shards = self._shards()
        scale = _attempt(f"engine {self.engine.name}", self.engine.grad_scale).result
        if shards is None or scale is None:
            return [], [None] * len(active)
        reading = Reading([s for s in shards if s.is_counted], scale, is_recheck)
        vectors = [
            None
            if probe.name in self._failed_here
            else _attempt(probe.name, probe.read, reading).result
            for probe in active
        ]
        return shards, vectors

    def _shards(self) -> list[Shard] | None:
        return _attempt(f"engine {self.engine.name}", lambda: [*self.engine.shards()]).result

    def _sum(self, vector: Tensor) -> Array:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(vector)
        return vector.cpu().numpy()

    # -- the metrics -----------------------------------------------------------------------

    def _values(self, active: Sequence[Probe], reduced: _Reduced) -> list[Part]:
        measured = []
        for probe in active:
            if probe.name in reduced.failed:
                self._count_failure(probe)
                continue
            # The totals are alike on all ranks, so what raises here does so on all.
            values = _attempt(probe.name, probe.values, reduced.totals[probe.name])
            if not values.done:
                self._count_failure(probe)
            elif values.result is not None:
                measured.append((self._schema(probe), values.result))
        return measured

    def _schema(self, probe: Probe) -> Schema:
        """The same object each time: comparing thousands of names costs more than the record."""
        if probe.name not in self._schemas:
            self._schemas[probe.name] = Schema(probe.names)
        return self._schemas[probe.name]

    def _count_failure(self, probe: Probe) -> None:
        """Counts a failure seen by any rank; all ranks count alike, so all disable alike."""
        self._failures[probe.name] += 1
        if self._failures[probe.name] == _MAX_FAILURES:
            logger.error("monitor: probe %r failed %d times: off", probe.name, _MAX_FAILURES)


@dataclass
class _Reduced:
    """One vector, over all ranks: the caller's sums, each probe's, and who raised on any rank."""

    extra: Array
    totals: dict[str, Array] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Attempt(Generic[_T]):
    done: bool
    result: _T | None = None


def _attempt(what: str, call: Callable[..., _T], *args: object) -> _Attempt[_T]:
    """Calls; what raises is logged: monitoring never stops training."""
    try:
        return _Attempt(done=True, result=call(*args))
    except Exception:
        logger.exception("monitor: %s failed", what)
        return _Attempt(done=False)


class _Slots:
    """Where in the vector each rank puts its maximum of each parameter that it holds a part of.

    Made once, with one all-reduce of which rank holds what.
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
        by_parameter = holds.cpu().numpy().T.nonzero()
        self._of_slot, of_rank = by_parameter
        self.size = len(self._of_slot)
        mine = (of_rank == rank).nonzero()[0]
        self._mine = torch.from_numpy(mine).to(engine.device)
        self._my_parameters = torch.from_numpy(self._of_slot[mine]).to(engine.device)

    def place(self, row: Tensor) -> Tensor:
        """This rank's maxima [P] in its slots [size], zeros in the others'."""
        placed = torch.zeros(self.size, dtype=torch.float64, device=row.device)
        mine, parameters = self._mine.to(row.device), self._my_parameters.to(row.device)
        return placed.index_copy_(0, mine, row.index_select(0, parameters))

    def largest(self, slots: Array) -> Array:
        """The largest over ranks of each parameter [P], zero where nobody holds it."""
        result = np.zeros(self.width)
        with np.errstate(invalid="ignore"):  # NaN stays NaN; the step is then read once more
            np.maximum.at(result, self._of_slot, slots)
        return result

"""Reads a step: all probes in one vector, one all-reduce, one copy to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.engines import Engine, Shard
from ulysses_monitor.probes.base import FollowUp, Probe, Reading
from ulysses_monitor.probes.slots import MaximaSlots
from ulysses_monitor.records import Schema, schema_of

__all__ = ["Capture", "CapturedStep"]

Array = npt.NDArray[np.float64]
Part = tuple[Schema, Array]
"""Names and values of what one probe measured."""

_T = TypeVar("_T")
_P = TypeVar("_P", bound=Probe)


@dataclass(frozen=True)
class CapturedStep:
    """The result of one reading, the same on all ranks.

    Attributes:
        parts: metrics of this step.
        previous_parts: metrics of the step before, from the follow-ups.
        extra: the caller's own values, summed over ranks.
    """

    parts: list[Part]
    previous_parts: list[Part]
    extra: dict[str, float]


class Capture:
    """Reads an engine with a set of probes.

    The ranks reduce one vector per step. It holds, in this order: the caller's own sums, one
    failure flag for each active probe, the sums of every active probe, and the maxima. A sum over
    ranks cannot give a maximum, so each rank that holds a part of a parameter has its own slot
    for it.

    The vector has the same length on all ranks at every step, because it depends only on the step
    number and on reduced failure counts. A probe that raises on one rank sends zeros and its flag,
    so the collective stays balanced. NaN or Inf in a step cause a second reading of that step.

    Every rank must make a capture, at the same time.

    Args:
        engine: the engine to read.
        probes: the probes that read a step before the optimizer takes it.
        sample_every: probes of cost class ``sampled`` are read at steps 1, 1 + N, 1 + 2N, ...
        follow_ups: the probes that look at sampled steps afterwards.
        guard: switches off probes that keep failing.
    """

    def __init__(
        self,
        engine: Engine,
        probes: Sequence[Probe],
        sample_every: int,
        follow_ups: Sequence[FollowUp] = (),
        guard: Guard | None = None,
    ) -> None:
        self.engine = engine
        self.sample_every = sample_every
        self._probes = list(probes)
        self._follow_ups = list(follow_ups)
        self._schemas: dict[str, Schema] = {}
        self._guard = guard or Guard()
        self._slots = MaximaSlots(engine)
        self._measuring = False
        self._raised_here: set[str] = set()

    def names(self) -> set[str]:
        """Returns the names of all metrics that can be known before the optimizer steps."""
        return {name for probe in self._probes for name in probe.names}

    def is_sampled(self, step: int) -> bool:
        """Returns whether probes of cost class ``sampled`` are read at `step`."""
        return (step - 1) % self.sample_every == 0

    def read(
        self,
        step: int,
        extra: Mapping[str, Tensor | float],
        is_current: Callable[[Mapping[str, float]], bool] = lambda _: True,
    ) -> CapturedStep:
        """Reads one step; every rank must call it at the same step.

        Args:
            step: number of the optimizer step.
            extra: the caller's own values on this rank; the names are the same on all ranks.
            is_current: whether the probes read what they should, by `extra` summed over ranks; if
                not, the step has no metrics.
        """
        now = self._active(p for p in self._probes if p.cost == "every" or self.is_sampled(step))
        late = self._active(self._follow_ups) if self._measuring else []
        with torch.no_grad():
            reduced, shards = self._reduce([*now, *late], list(extra.values()))
            sums = dict(zip(extra, reduced.extra.tolist(), strict=True))
            self._measuring = False
            if is_current(sums):
                self._recheck(now, reduced)
                self._prepare(step, shards)
            else:
                now = []
        return CapturedStep(
            parts=self._values(now, reduced),
            previous_parts=self._values(late, reduced),
            extra=sums,
        )

    def finish_step(self, done: bool) -> None:
        """Measures what the optimizer step did, if it is a sampled step.

        Args:
            done: False if the step was skipped, for example because of an overflow.
        """
        if self._measuring and done:
            shards = self._shards() or []
            with torch.no_grad():
                for probe in self._active(self._follow_ups):
                    self._note_failure(probe, self._attempt(_part(probe), probe.after_step, shards))

    def _prepare(self, step: int, shards: list[Shard]) -> None:
        """Prepares the follow-ups for the coming optimizer step, if it is a sampled one."""
        self._measuring = self.is_sampled(step) and bool(self._follow_ups)
        self._raised_here.clear()
        if self._measuring:
            for probe in self._active(self._follow_ups):
                self._note_failure(probe, self._attempt(_part(probe), probe.before_step, shards))

    def _note_failure(self, probe: Probe, attempt: _Attempt[None]) -> None:
        """Remembers that a follow-up raised on this rank until the vector tells all ranks."""
        if not attempt.succeeded:
            self._raised_here.add(probe.name)

    def _active(self, probes: Iterable[_P]) -> list[_P]:
        return [p for p in probes if not self._guard.is_off(_part(p))]

    # -- the vector ------------------------------------------------------------------------

    def _reduce(
        self, active: Sequence[Probe], extra: list[Tensor | float], is_recheck: bool = False
    ) -> tuple[_Reduced, list[Shard]]:
        """Returns the totals over all ranks, and all shards of this rank."""
        device = self.engine.device
        shards, vectors = self._read(active, is_recheck)
        flags = torch.tensor([float(v is None) for v in vectors], dtype=torch.float64)
        parts = [self._own(value) for value in extra]
        parts.append(flags)
        width = self._slots.width
        for probe, vector in zip(active, vectors, strict=True):
            if vector is None:
                vector = torch.zeros(probe.size + probe.maxima * width, dtype=torch.float64)
            parts.append(vector[: probe.size])
            maxima = vector[probe.size :].view(probe.maxima, width)  # [maxima * P] -> [maxima, P]
            parts += [self._slots.place(row) for row in maxima]
        totals = self._all_reduce(torch.cat([part.to(device, non_blocking=True) for part in parts]))
        return self._split(active, totals, len(extra)), shards

    def _own(self, value: Tensor | float) -> Tensor:
        """Returns a caller's value for the vector, NaN if it is none: all ranks wait for it."""

        def convert() -> Tensor:
            number = torch.as_tensor(value, dtype=torch.float64).reshape(1)
            return number.to(self.engine.device, non_blocking=True)

        converted = self._attempt("observing", convert).result
        return torch.full((1,), torch.nan, dtype=torch.float64) if converted is None else converted

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
        """Reads again what has NaN or Inf in its totals, which are the same on all ranks."""
        nonfinite = [
            p for p in active if p.rechecks and not np.isfinite(reduced.totals[p.name]).all()
        ]
        if nonfinite:
            again, _ = self._reduce(nonfinite, [], is_recheck=True)
            reduced.totals.update(again.totals)
            reduced.failed.update(again.failed)

    def _read(
        self, active: Sequence[Probe], is_recheck: bool
    ) -> tuple[list[Shard], list[Tensor | None]]:
        """Returns all shards, and the vector of each probe, or None if it raised."""
        shards = self._shards()
        scale = self._attempt(f"engine {self.engine.name}", self.engine.grad_scale).result
        if shards is None or scale is None:
            return [], [None] * len(active)
        reading = Reading([s for s in shards if s.is_counted], scale, is_recheck)
        vectors = [
            None
            if probe.name in self._raised_here
            else self._attempt(_part(probe), probe.read, reading).result
            for probe in active
        ]
        return shards, vectors

    def _shards(self) -> list[Shard] | None:
        return self._attempt(f"engine {self.engine.name}", lambda: [*self.engine.shards()]).result

    def _all_reduce(self, vector: Tensor) -> Array:
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
            # The totals are the same on all ranks, so an error here is raised on all of them.
            values = self._attempt(_part(probe), probe.values, reduced.totals[probe.name])
            if not values.succeeded:
                self._count_failure(probe)
            elif values.result is not None:
                measured.append((self._schema(probe), values.result))
        return measured

    def _schema(self, probe: Probe) -> Schema:
        """Returns the same object each time: comparing thousands of names would cost too much.

        A training that returns to parameters that it trained before returns to their schema.
        """
        if probe.name not in self._schemas:
            self._schemas[probe.name] = schema_of(probe.names)
        return self._schemas[probe.name]

    def _count_failure(self, probe: Probe) -> None:
        """Counts a failure on any rank; all ranks count the same, so all switch off together."""
        self._guard.count_failure(_part(probe), "it failed too often on some rank")

    def _attempt(self, part: str, call: Callable[..., _T], *args: object) -> _Attempt[_T]:
        """Calls a function; what it raises is reported and does not reach the training."""
        try:
            return _Attempt(succeeded=True, result=call(*args))
        except Exception as error:  # noqa: BLE001 - report_failure logs it
            self._guard.report_failure(part, error)
            return _Attempt(succeeded=False)


@dataclass
class _Reduced:
    """The reduced vector: the caller's sums, each probe's totals, and the probes that raised."""

    extra: Array
    totals: dict[str, Array] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Attempt(Generic[_T]):
    """The outcome of a call that may have raised."""

    succeeded: bool
    result: _T | None = None


def _part(probe: Probe) -> str:
    return f"probe {probe.name}"

"""Puts together again what policies and rules saw of each step of a recorded run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.reading import RunReader, make_name_filter, take_rows
from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.store import Block

__all__ = ["TRAINED", "MetricTimes", "Start", "Starts", "keep_trained", "make_records"]

_SECONDS = "train/step_seconds/total"
TRAINED = (_SECONDS, "optim/lr/0", "grad/norm/total", "train/loss/total")
"""Each trained step has one of these metrics; a row without them was recorded between steps."""

_BEFORE_END = (
    *("grad/*", "lora/*", "optim/*", "param/*", "sp/*"),
    *("train/loss/total", "train/loss_tokens/total"),
)
"""Known before a step is done, unless they are listed below."""

_AT_END = (_SECONDS, "train/tokens_per_second/total", "train/mfu/total", "monitor/*")
_OF_UPDATE = ("optim/update_ratio/*", "lora/update_ratio_*")
"""Measured when the step was done, and recorded with the next one."""

_BETWEEN_STEPS = ("eval/*", MAX_STEPS)

_CHUNK = 1024
"""Steps that are converted to float64 at a time."""


@dataclass(frozen=True)
class MetricTimes:
    """The metrics of a run by when they were known.

    Attributes:
        before_end: before the step was done; policies see these.
        at_end: when the step was done; rules see these as well.
        of_update: with the next step.
    """

    before_end: frozenset[str]
    at_end: frozenset[str]
    of_update: frozenset[str]

    @classmethod
    def of(cls, run: RunReader) -> MetricTimes:
        """Sorts the metrics of `run`."""
        names = run.names()
        update, end, between, step = (
            frozenset(filter(make_name_filter(patterns), names))
            for patterns in (_OF_UPDATE, _AT_END, _BETWEEN_STEPS, _BEFORE_END)
        )
        others = [name for name in names if name not in update | end | between | step]
        before = (step | (frozenset(others) - _logged_by_user(run, names, others))) - update
        return cls(before, end, update)


def _logged_by_user(run: RunReader, names: Sequence[str], others: Sequence[str]) -> set[str]:
    """Returns which of the unknown names `others` came from `Monitor.log`, not from a source."""
    if not others or _SECONDS not in names:
        return set()
    place = {name: i for i, name in enumerate(names)}
    found = {name for name in others if place[name] > place[_SECONDS]}
    early = {name for name in others if name not in found}
    if not early:
        return found
    # By family: thousands of names as patterns would take minutes.
    families = {f"{name.split('/')[0]}/*" for name in early}
    block = run.block(*TRAINED, *families, missing="ignore")
    between = block.present[~_is_trained(block)]
    return found | {n for i, n in enumerate(block.names) if n in early and between[:, i].any()}


def _is_trained(block: Block) -> npt.NDArray[np.bool_]:
    """Returns which rows are trained steps [N]; all of them if nothing tells."""
    columns = [i for i, name in enumerate(block.names) if name in TRAINED]
    if not columns:
        return np.ones(len(block.steps), bool)
    return np.asarray(block.present[:, columns].any(axis=1))


def keep_trained(block: Block) -> Block:
    """Returns the rows of `block` that are trained steps."""
    rows = _is_trained(block)
    return block if rows.all() else take_rows(block, rows)


def make_records(block: Block, names: Collection[str]) -> Iterator[StepRecord]:
    """Yields a record for each row, with those of `names` that the step has."""
    columns = [i for i, name in enumerate(block.names) if name in names]
    schemas = _Schemas([block.names[i] for i in columns])
    for first in range(0, len(block.steps), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        values = block.values[chunk][:, columns].astype(np.float64)
        present = block.present[chunk][:, columns]
        rows = zip(block.steps[chunk], block.times[chunk], values, present, strict=True)
        for step, time, row, has in rows:
            yield StepRecord(int(step), float(time), schemas.of(has), row[has])


class _Schemas:
    """One schema for all steps that have the same metrics."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._made: dict[bytes, Schema] = {}

    def of(self, has: npt.NDArray[np.bool_]) -> Schema:
        key = has.tobytes()
        if key not in self._made:
            self._made[key] = Schema(tuple(itertools.compress(self._names, has)))
        return self._made[key]


@dataclass(frozen=True)
class Start:
    """One start of a run: the first, or a resume.

    Attributes:
        step: the last step done before it.
        max_steps: optimizer steps of the training, None if unknown.
        policies: names of the policies it had.
        without_memory: those of them whose memory the checkpoint did not contain.
    """

    step: int
    max_steps: int | None = None
    policies: frozenset[str] = frozenset()
    without_memory: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Starts:
    """All starts of a run, in order.

    Attributes:
        found: the starts that the run recorded.
        planned: `max_steps` of a run that recorded no start.
    """

    found: list[Start]
    planned: int | None

    @classmethod
    def of(cls, run: RunReader) -> Starts:
        """Reads the starts of `run`."""
        found: list[Start] = []
        for event in run.event_list():
            if event["kind"] == "start":
                names = event.get("policies")
                known = frozenset(names) if isinstance(names, Mapping) else frozenset()
                step = _as_int(event["step"]) or 0
                found.append(Start(step, _as_int(event.get("max_steps")), known))
            elif event["kind"] == "monitor" and found:
                names = event.get("policies_anew")
                found[-1].without_memory.update(map(str, names) if isinstance(names, list) else ())
        return cls(found, None if found else _as_int(run.info.get("max_steps")))

    @property
    def largest_plan(self) -> int | None:
        """The most steps that a start planned."""
        return max((s.max_steps for s in self.found if s.max_steps), default=self.planned)

    def of_steps(self, steps: npt.NDArray[np.int64]) -> list[int]:
        """Returns the index of the start that each step belongs to, -1 before the first."""
        which = np.full(len(steps), -1)
        for i, start in enumerate(self.found):
            which[steps > start.step] = i
        return [int(i) for i in which]

    def max_steps(self, index: int) -> int | None:
        """Returns the number of steps that start `index` planned."""
        return self.planned if index < 0 else self.found[index].max_steps


def _as_int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

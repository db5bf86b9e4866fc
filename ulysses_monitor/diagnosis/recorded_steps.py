"""Puts together again what policies and rules saw of each step of a recorded run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.reading import (
    RunReader,
    make_name_filter,
    read_columns,
    read_windows,
    take_rows,
)
from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.store import Block

__all__ = [
    "TRAINED",
    "MetricTimes",
    "RecordMaker",
    "Start",
    "Starts",
    "read_trained",
    "trained_steps",
]

_SECONDS = "train/step_seconds/total"
TRAINED = (_SECONDS, "optim/lr/0", "grad/norm/total", "train/loss/total")
"""Each trained step has one of these metrics; a row without them was recorded between steps."""

_BEFORE_END = (
    *("grad/*", "lora/*", "optim/*", "param/*", "sp/*", "system/*"),
    *("train/loss/total", "train/loss_tokens/total"),
)
"""Known before a step is done, unless they are listed below."""

_AT_END = (_SECONDS, "train/tokens_per_second/total", "train/mfu/total", "monitor/*")
_CLIP = "grad/clip_coef/total"
"""Known before a step is done where a Trainer or an engine clips, and when it is done in a loop."""
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
        logged: after the step was done, by the Trainer or the user; only rules see these.
    """

    before_end: frozenset[str]
    at_end: frozenset[str]
    of_update: frozenset[str]
    logged: frozenset[str] = frozenset()

    @classmethod
    def of(cls, run: RunReader) -> MetricTimes:
        """Sorts the metrics of `run`."""
        names = run.names()
        update, end, between, step = (
            frozenset(filter(make_name_filter(patterns), names))
            for patterns in (_OF_UPDATE, _AT_END, _BETWEEN_STEPS, _BEFORE_END)
        )
        if _is_after_seconds(_CLIP, names):
            step, end = step - {_CLIP}, end | {_CLIP}
        others = [name for name in names if name not in update | end | between | step]
        before = (step | (frozenset(others) - _logged_by_user(run, names, others))) - update
        return cls(before, end, update, frozenset(names) - before - end - update - {MAX_STEPS})


def _is_after_seconds(name: str, names: Sequence[str]) -> bool:
    """Whether `name` was recorded behind the step's duration, so when the step was done."""
    return {name, _SECONDS} <= set(names) and names.index(name) > names.index(_SECONDS)


def _logged_by_user(run: RunReader, names: Sequence[str], others: Sequence[str]) -> set[str]:
    """Returns which of the unknown names `others` came from `Monitor.log`, not from a source."""
    if not others or _SECONDS not in names:
        return set()
    place = {name: i for i, name in enumerate(names)}
    found = {name for name in others if place[name] > place[_SECONDS]}
    early = {name for name in others if name not in found}
    if not early:
        return found
    trained = trained_steps(run)
    for block in read_columns(run, sorted(early)):
        between = block.present[~np.isin(block.steps, trained)]
        found.update(block.names[i] for i in np.flatnonzero(between.any(axis=0)))
    return found


def trained_steps(run: RunReader) -> npt.NDArray[np.int64]:
    """Returns the numbers of the steps that the run trained and recorded, ascending [N]."""
    known = [name for name in run.names() if name in TRAINED]
    return _keep_trained(run.block(*known)).steps if known else _all_steps(run)


def _all_steps(run: RunReader) -> npt.NDArray[np.int64]:
    """Returns the steps of a run of which nothing tells which were trained."""
    found = [block.steps for block in read_columns(run, run.names())]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def read_trained(run: RunReader, names: Collection[str]) -> Iterator[Block]:
    """Yields the trained steps in blocks of a limited size, with the metrics `names`."""
    steps = trained_steps(run)
    chosen = [name for name in run.names() if name in names]
    for block in read_windows(run, chosen, last=int(steps[-1]) if len(steps) else None):
        yield take_rows(block, np.isin(block.steps, steps))


def _is_trained(block: Block) -> npt.NDArray[np.bool_]:
    """Returns which rows are trained steps [N]; all of them if nothing tells."""
    columns = [i for i, name in enumerate(block.names) if name in TRAINED]
    if not columns:
        return np.ones(len(block.steps), bool)
    return np.asarray(block.present[:, columns].any(axis=1))


def _keep_trained(block: Block) -> Block:
    """Returns the rows of `block` that are trained steps."""
    rows = _is_trained(block)
    return block if rows.all() else take_rows(block, rows)


class RecordMaker:
    """Makes records of the rows of blocks; all that have the same metrics share a schema.

    Args:
        names: the metrics of a record, as far as its step has them.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._schemas: dict[tuple[str, ...], Schema] = {}

    def make(self, block: Block) -> Iterator[StepRecord]:
        """Yields a record for each row."""
        columns = [i for i, name in enumerate(block.names) if name in self._names]
        names = [block.names[i] for i in columns]
        known: dict[bytes, Schema] = {}
        for first in range(0, len(block.steps), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            values = block.values[chunk][:, columns].astype(np.float64)
            present = block.present[chunk][:, columns]
            rows = zip(block.steps[chunk], block.times[chunk], values, present, strict=True)
            for step, time, row, has in rows:
                key = has.tobytes()
                if key not in known:
                    found = tuple(itertools.compress(names, has))
                    known[key] = self._schemas.setdefault(found, Schema(found))
                yield StepRecord(int(step), float(time), known[key], row[has])


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

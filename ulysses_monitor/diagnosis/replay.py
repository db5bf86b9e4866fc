"""What policies and rules would have said of a recorded run, step by step; nothing is written.

Policies are pure functions of the history, and the run store keeps what they saw: float32 values,
of which those that are known before a step is done are put together again here. So of a run in
shadow mode, the same policies decide what its ``events.jsonl`` says. What can differ, and why:

- While policies are active, ``grad/clip_coef/total`` and ``optim/lr/*`` are recorded as they are
  after they have acted.
- Policies that were off for a time, because a person or an error switched them off, are asked.
- A step that was decided and not finished, as in a crash, left no record. Of a step that was
  trained twice, the later training counts, and the earlier one in metrics that the later lacks.
- `StepRecord.time` is that of the last thing recorded of the step; policies should have no clock.
- What is said of a step that is not finite went by float64: here a count of elements above 2**24 is
  rounded, and a loss that float32 cannot hold is infinite.
- The names of a record may come in another order where a run was resumed with other metrics.
- Which metrics a user has added with `Monitor.record`, which policies never see, is known by where
  their names stand: those that are not of this project's families count as added where they come
  after the first step's own, or where a step has them that was not trained. A source that was added
  in the middle of a run cannot be told from that, and is left out.

Rules see a step in float64 while it trains, and in float32 here: a value within 1e-7 of a threshold
may lie on its other side, a number in a message may be rounded otherwise, and what float32 cannot
hold is infinite. They begin anew with each start of the run, as they do in a new process.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies import (
    POLICIES,
    BuiltinPolicy,
    Decision,
    Managed,
    PolicySet,
    make_policies,
)
from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.policies.policy_set import is_sound
from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.reading.selection import matching, rows_of
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.rules import RuleSet, make_rules
from ulysses_monitor.store import Block

__all__ = ["Fitting", "fit_policies", "replay_policies", "replay_rules", "trained_steps"]

_SECONDS = "train/step_seconds/total"
_TRAINED = (_SECONDS, "optim/lr/0", "grad/norm/total", "train/loss/total")
"""Of which each trained step has one; a row without them holds what was recorded beside."""

_OF_THE_STEP = (
    *("grad/*", "lora/*", "optim/*", "param/*", "sp/*"),
    *("train/loss/total", "train/loss_tokens/total"),
)
"""Known before a step is done, unless they are among the next."""

_OF_ITS_END = (_SECONDS, "train/tokens_per_second/total", "train/mfu/total", "monitor/*")
_OF_ITS_UPDATE = ("optim/update_ratio/*", "lora/update_ratio_*")
"""Measured when the step was done, and recorded with the next one."""

_BESIDE = ("eval/*", MAX_STEPS)

_KINDS = frozenset(POLICIES.values())
"""Policies that say what they read."""

_ROWS = 1024
"""Steps that are made float64 at a time."""


def replay_policies(run: RunReader, policies: str | Sequence[Any]) -> list[Event]:
    """What `policies` would have decided, had they been in shadow mode from the run's start on.

    They are asked as in a training, except that those may be asked together which could not act
    together. What they need is read, all metrics where one of them is the user's own.

    Args:
        run: finished or alive.
        policies: see `make_policies`.

    Returns:
        An event of kind ``action`` for each decision, as the run would have recorded it, with the
        time of its step.

    Raises:
        InputError: a policy is wrong, or one that was named could not act in this run.
    """
    if not len(trained_steps(run)):
        make_policies(policies)
        return []
    asked = fit_policies(run, policies).policies
    if not asked:
        return []
    names = _Names.of(run)
    block = _trained(run.block(*_wanted(run, asked)))
    starts = _Starts.of(run)
    which = starts.of_steps(block.steps)
    plans = [starts.max_steps(i) for i in which]
    found = []
    policy_set, now = PolicySet(asked, "shadow"), which[0] if which else -1
    for i, record in zip(which, _records(block, names.before, plans), strict=True):
        if i != now:
            policy_set, now = _resumed(policy_set, asked, starts.found[i]), i
        found += [_event(decision, record) for decision in _decide(policy_set, record)]
    for policy in asked:  # an object of the user's remembers no more than before
        policy.reset()
    return found


def replay_rules(run: RunReader, rules: str | Iterable[Any]) -> list[Event]:
    """The alerts that `rules` would have given.

    Args:
        run: finished or alive.
        rules: see `make_rules`.

    Returns:
        An event of kind ``alert`` for each, with the time of its step.

    Raises:
        InputError: a rule is wrong.
    """
    checked = make_rules(rules)
    names = _Names.of(run)
    block = _trained(run.block()) if checked else Block.empty()
    which = _Starts.of(run).of_steps(block.steps)
    steps = _records(block, names.before | names.at_its_end)
    updates = _records(block, names.of_its_update)
    found, rule_set, now = [], RuleSet(checked), which[0] if which else -1
    for i, step, update in zip(which, steps, updates, strict=True):
        if i != now:
            rule_set, now = RuleSet(checked), i
        for record in (step, update) if update.schema.names else (step,):
            found += [alert.to_event(record.time) for alert in rule_set.observe(record)]
    return found


def trained_steps(run: RunReader) -> npt.NDArray[np.int64]:
    """Numbers of the steps that the run trained and recorded, ascending [N]."""
    known = [name for name in run.names() if name in _TRAINED]
    return _trained(run.block(*known)).steps


@dataclass(frozen=True)
class Fitting:
    """Which policies can be asked of a run.

    Attributes:
        policies: those that can.
        left_out: why another cannot, by its name.
    """

    policies: list[Managed]
    left_out: Mapping[str, str]


def fit_policies(run: RunReader, policies: str | Sequence[Any]) -> Fitting:
    """Leaves out what is off, and of presets what cannot act in this run, as a training does.

    Args:
        run: whose metrics and number of steps count.
        policies: see `make_policies`.

    Raises:
        InputError: a policy is wrong, or one that was named cannot act.
    """
    from ulysses_monitor.steering.checks import fitting  # it knows actions, and they know torch

    metrics, max_steps = _collected(_Names.of(run).before), _Starts.of(run).most
    fit, left_out = [], {}
    for policy in make_policies(policies):
        try:
            # As one that was named, so that it says what a preset's would only log.
            alone = dataclasses.replace(policy, preset="")
            if policy.mode == "off":
                left_out[policy.name] = "its mode is off"
            elif fitting([alone], metrics, max_steps, ("save", "stop")):
                fit.append(_begun_anew(policy))
        except InputError as error:
            if not policy.preset:
                raise
            left_out[policy.name] = str(error).removeprefix(f"policy {policy.name}: ")
    return Fitting(fit, left_out)


def _collected(names: frozenset[str]) -> frozenset[str]:
    """With Adam's moments, that a training looks for also where its optimizer has none (yet)."""
    scopes = [name.removeprefix("grad/norm") for name in names if name.startswith("grad/norm/")]
    moments = ("optim/exp_avg_norm", "optim/exp_avg_sq_mean")
    return names | {stat + scope for stat in moments for scope in scopes}


def _begun_anew(policy: Managed) -> Managed:
    """Without what a training has taught it, or still does, where it is one of the project's."""
    if type(policy.policy) not in _KINDS:
        return policy
    assert isinstance(policy.policy, BuiltinPolicy)  # noqa: S101 - as all of them
    return dataclasses.replace(policy, policy=dataclasses.replace(policy.policy))


# -- what was seen of a step ------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """Metrics of a run by when they are known.

    Attributes:
        before: a step is done: policies see them.
        at_its_end: rules see them, too.
        of_its_update: known with the next step.
    """

    before: frozenset[str]
    at_its_end: frozenset[str]
    of_its_update: frozenset[str]

    @classmethod
    def of(cls, run: RunReader) -> _Names:
        names = run.names()
        update, end, beside, step = (
            frozenset(filter(matching(patterns), names))
            for patterns in (_OF_ITS_UPDATE, _OF_ITS_END, _BESIDE, _OF_THE_STEP)
        )
        others = [name for name in names if name not in update | end | beside | step]
        before = (step | (frozenset(others) - _recorded_beside(run, names, others))) - update
        return cls(before, end, update)


def _recorded_beside(run: RunReader, names: Sequence[str], others: Sequence[str]) -> set[str]:
    """Of names that nobody here gave, those of `Monitor.record` and not of a source."""
    if not others or _SECONDS not in names:
        return set()
    place = {name: i for i, name in enumerate(names)}
    found = {name for name in others if place[name] > place[_SECONDS]}
    early = {name for name in others if name not in found}
    if not early:
        return found
    # By family: thousands of names as patterns would take minutes.
    block = run.block(*_TRAINED, *{f"{name.split('/')[0]}/*" for name in early})
    beside = block.present[~_is_trained(block)]
    return found | {n for i, n in enumerate(block.names) if n in early and beside[:, i].any()}


def _is_trained(block: Block) -> npt.NDArray[np.bool_]:
    """Which rows are trained steps [N]; all where nothing tells."""
    columns = [i for i, name in enumerate(block.names) if name in _TRAINED]
    if not columns:
        return np.ones(len(block.steps), bool)
    return np.asarray(block.present[:, columns].any(axis=1))


def _trained(block: Block) -> Block:
    rows = _is_trained(block)
    return block if rows.all() else rows_of(block, rows)


def _wanted(run: RunReader, policies: Sequence[Managed]) -> list[str]:
    """Patterns of what is to be read; none, which is all, where a policy does not say it."""
    if not all(type(policy.policy) in _KINDS for policy in policies):
        return []
    patterns = {pattern for policy in policies for pattern in policy.needed_metrics}
    # What a policy says it has read names modules beside the total that it goes by.
    modules = {p.removesuffix("total") + "module/*" for p in patterns if p.startswith("lora/")}
    unsound = run.block("grad/nonfinite/total").values > 0
    where = ["grad/nonfinite/param/*"] if unsound.any() else []
    return [*_TRAINED, "grad/nonfinite/total", *where, *sorted(patterns | modules)]


def _records(
    block: Block, names: Collection[str], max_steps: Sequence[int | None] = ()
) -> Iterator[StepRecord]:
    """A record for each row, with those of `names` that the step has.

    Args:
        block: the rows.
        names: the columns.
        max_steps: of each row's training, where they are known; none where nobody is to see them.
    """
    columns = [i for i, name in enumerate(block.names) if name in names]
    schemas = _Schemas([block.names[i] for i in columns])
    for first in range(0, len(block.steps), _ROWS):
        chunk = slice(first, first + _ROWS)
        values = block.values[chunk][:, columns].astype(np.float64)
        present = block.present[chunk][:, columns]
        plans = max_steps[chunk] if max_steps else [None] * len(values)
        rows = zip(block.steps[chunk], block.times[chunk], values, present, plans, strict=True)
        for step, time, row, has, planned in rows:
            schema = schemas.of(has, planned is not None)
            own = row[has] if planned is None else np.append(row[has], float(planned))
            yield StepRecord(int(step), float(time), schema, own)


class _Schemas:
    """One schema for all steps that have the same of `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._made: dict[tuple[bytes, bool], Schema] = {}

    def of(self, has: npt.NDArray[np.bool_], planned: bool) -> Schema:
        key = has.tobytes(), planned
        if key not in self._made:
            own = itertools.compress(self._names, has)
            self._made[key] = Schema((*own, MAX_STEPS) if planned else tuple(own))
        return self._made[key]


# -- the trainings that a run had -------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """One start of the run.

    Attributes:
        step: the last step that was done before.
        max_steps: of the training, where they were known.
        policies: that it had.
        anew: those of them whose memory the checkpoint did not hold.
    """

    step: int
    max_steps: int | None = None
    policies: frozenset[str] = frozenset()
    anew: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Starts:
    """All starts of a run, in their order; `planned` where it recorded none."""

    found: list[_Start]
    planned: int | None

    @classmethod
    def of(cls, run: RunReader) -> _Starts:
        found: list[_Start] = []
        for event in run.event_list():
            if event["kind"] == "start":
                names = event.get("policies")
                known = frozenset(names) if isinstance(names, Mapping) else frozenset()
                step = _whole(event["step"]) or 0
                found.append(_Start(step, _whole(event.get("max_steps")), known))
            elif event["kind"] == "monitor" and found:
                names = event.get("policies_anew")
                found[-1].anew.update(map(str, names) if isinstance(names, list) else ())
        return cls(found, None if found else _whole(run.info.get("max_steps")))

    @property
    def most(self) -> int | None:
        """The most steps that a start planned."""
        return max((s.max_steps for s in self.found if s.max_steps), default=self.planned)

    def of_steps(self, steps: npt.NDArray[np.int64]) -> list[int]:
        """The start whose training each step is of: the last that came before it; else -1."""
        which = np.full(len(steps), -1)
        for i, start in enumerate(self.found):
            which[steps > start.step] = i
        return [int(i) for i in which]

    def max_steps(self, which: int) -> int | None:
        """What that training planned."""
        return self.planned if which < 0 else self.found[which].max_steps


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# -- asking -----------------------------------------------------------------------------------


def _decide(policies: PolicySet, record: StepRecord) -> list[Decision]:
    """As the training does."""
    if is_sound(record):
        return policies.decide(record)
    from ulysses_monitor.steering.steering import leave_out

    return [Decision("nonfinite", leave_out(record), shadow=True)]


def _resumed(policies: PolicySet, managed: Sequence[Managed], start: _Start) -> PolicySet:
    """The policies after a resume: with what they remember, unless the run says otherwise."""
    if start.anew and start.anew >= start.policies:
        return PolicySet(managed, "shadow")
    for policy in managed:
        if policy.name in start.anew:
            policy.reset()
    return policies


def _event(decision: Decision, record: StepRecord) -> Event:
    from ulysses_monitor.steering.told import Told

    return dataclasses.replace(Told(decision).to_event(record.step), time=record.time)

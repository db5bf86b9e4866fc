"""What a rule is, and how a set of rules turns record history into alerts."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from ulysses_monitor.common.errors import nearest
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.records import Alert, Schema, StepRecord
from ulysses_monitor.rules.history import HISTORY, History

__all__ = ["HISTORY", "Rule", "RuleSet", "Timing"]

_PLANS = 256
"""Schemas whose rules are kept: a training may change what it trains any number of times."""


@runtime_checkable
class Rule(Protocol):
    """A pure function of record history: the same code serves a live run and a replay.

    A rule may also have the settings of `Timing`, as attributes, and `needs`, the names or patterns
    of the metrics that it reads: without one of them in a record it is not asked.
    """

    @property
    def name(self) -> str:
        """The name that alerts carry as `Alert.rule`."""
        ...

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """Returns alerts for the newest record, ``history[-1]``; must not keep state of its own.

        Args:
            history: up to `HISTORY` records of training steps, oldest first, never empty.
        """
        ...


@dataclass(frozen=True)
class Timing:
    """When the condition of a rule becomes an alert, and when it can become one again.

    Attributes:
        warmup: steps of the run that must have been seen before the first alert.
        patience: steps in a row, of those that the rule was asked at, at which its condition holds.
        cooldown: steps from one alert about a metric to the next.
        clear: steps in a row without the condition that end an alert.
    """

    warmup: int = 0
    patience: int = 1
    cooldown: int = 0
    clear: int = 1

    @classmethod
    def of(cls, rule: Rule) -> Timing:
        """Returns what `rule` has of these settings."""
        names = [each.name for each in dataclasses.fields(cls)]
        return cls(**{name: getattr(rule, name) for name in names if hasattr(rule, name)})


@dataclass(slots=True)
class _Spell:
    """A time in which a rule's condition holds for one metric."""

    since: int
    count: int = 0
    missed: int = 0
    newest: int = -1
    raised: float = -math.inf
    is_on: bool = False


@dataclass(slots=True, eq=False)
class _Watched:
    """A rule of a set, the spells of its metrics, and the steps that it was asked about.

    `asked` is the last one at which something held, `newest` the last one, `values` their number.
    """

    rule: Rule
    timing: Timing
    needs: tuple[str, ...]
    spells: dict[str, _Spell] = field(default_factory=dict)
    asked: int = -1
    newest: int = -1
    values: int = 0


class RuleSet:
    """Runs rules over a growing history and raises each alert once.

    An alert that continues stays silent until its condition did not hold for the rule's `clear`
    steps. What follows from the order of records is kept here, so that rules keep nothing.

    Args:
        rules: the rules.
        guard: calls the rules.
    """

    def __init__(self, rules: Iterable[Rule], guard: Guard | None = None) -> None:
        self._watched = [_Watched(rule, Timing.of(rule), _needs(rule)) for rule in rules]
        self._guard = guard or Guard()
        columns = (n for w in self._watched for n in getattr(w.rule, "columns", ()))
        tables = (n for w in self._watched for n in getattr(w.rule, "tables", ()))
        self._history = History(columns, tables)
        self._plans: dict[Schema, list[_Watched]] = {}
        self._steps = 0
        self._unseen = {need for w in self._watched for need in w.needs}
        self._names: set[str] = set()

    def observe(self, record: StepRecord) -> list[Alert]:
        """Adds `record` and returns the alerts that are new at it.

        A second record of the newest step is merged into the first: rules see whole steps. Only
        rules that need something of it are asked again.
        """
        history = self._history
        if not len(history) or history[-1].step != record.step:
            self._steps += 1
        history.append(record)
        plan = self._plans.get(record.schema)
        if plan is None:
            plan = self._make_plan(record.schema)
        new: list[Alert] = []
        for watched in plan:
            watched.values += watched.newest != record.step
            watched.newest = record.step
            try:
                found = watched.rule.check(history)
                if found or watched.spells:
                    new += self._follow(watched, found, record.step)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the guard logs it
                self._note_failure(watched, error)
        return new

    def unchecked(self) -> dict[str, str]:
        """Returns the rules that could not be checked so far, and why."""
        return {
            w.rule.name: reason for w in self._watched if (reason := self._why_unchecked(w)) != ""
        }

    def _make_plan(self, schema: Schema) -> list[_Watched]:
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        self._names.update(schema.names)
        self._unseen = {need for need in self._unseen if not _matches(need, schema)}
        plan = [w for w in self._watched if self._is_asked(w, schema)]
        self._plans[schema] = plan
        return plan

    def _is_asked(self, watched: _Watched, schema: Schema) -> bool:
        if self._guard.is_off(f"rule {watched.rule.name}"):
            return False
        trigger = getattr(watched.rule, "triggers", watched.needs)
        return not trigger or any(_matches(need, schema) for need in trigger)

    def _follow(self, watched: _Watched, found: Any, step: int) -> list[Alert]:
        """Counts the steps of each condition, and returns the alerts that begin."""
        if step != watched.asked:
            self._close_step(watched)
            watched.asked = step
        new: list[Alert] = []
        for alert in _as_alerts(found):
            spell = watched.spells.setdefault(alert.metric, _Spell(step))
            self._extend(spell, step)
            if self._is_due(spell, watched.timing, step):
                spell.is_on, spell.raised = True, step
                new.append(_complete(alert, spell.since))
        return new

    @staticmethod
    def _close_step(watched: _Watched) -> None:
        """Counts the step before: only now is it known that no further record of it came."""
        timing, step = watched.timing, watched.asked
        for metric, spell in list(watched.spells.items()):
            if spell.newest == step:
                continue
            spell.missed += 1
            if not spell.is_on or spell.missed >= timing.clear:
                spell.count, spell.is_on = 0, False
                if step - spell.raised >= timing.cooldown:
                    del watched.spells[metric]

    @staticmethod
    def _extend(spell: _Spell, step: int) -> None:
        if spell.newest != step:  # a second record of a step is not a second step
            if not spell.count:
                spell.since = step
            spell.count += 1
        spell.newest, spell.missed = step, 0

    def _is_due(self, spell: _Spell, timing: Timing, step: int) -> bool:
        return (
            not spell.is_on
            and spell.count >= timing.patience
            and self._steps > timing.warmup
            and step - spell.raised >= timing.cooldown
        )

    def _note_failure(self, watched: _Watched, error: BaseException) -> None:
        def fail() -> None:
            raise error

        part = f"rule {watched.rule.name}"
        self._guard.call(part, fail, None)
        if self._guard.is_off(part):
            for schema, plan in self._plans.items():  # a list may be iterated over just now
                self._plans[schema] = [each for each in plan if each is not watched]

    # -- what could not be checked -----------------------------------------------------------------

    def _why_unchecked(self, watched: _Watched) -> str:
        missing = [need for need in watched.needs if need in self._unseen]
        groups = getattr(watched.rule, "alternatives", False)
        if missing and (not groups or len(missing) == len(watched.needs)):
            return _why_missing(missing, self._names, any_of=groups)
        wait = max(watched.timing.warmup + 1, getattr(watched.rule, "steps_needed", 1))
        if self._steps < wait:
            return f"the run has {self._steps} steps; the rule waits for {wait}"
        wanted = getattr(watched.rule, "values_needed", 1) + watched.timing.patience - 1
        if watched.values < wanted:
            what = next(iter(getattr(watched.rule, "triggers", watched.needs)), "a step")
            return f"{what} has {watched.values} values; the rule needs {wanted}"
        return ""


_ABSENT: Mapping[str, str] = {
    "lora/": "the model has no LoRA adapters, or they could not be read",
    "optim/exp_avg": "the optimizer keeps no such state",
    "optim/lr_off_schedule": "the schedule is not one that a Trainer made from its arguments",
    "optim/lr": "the optimizer has no learning rate",
    "optim/beta": "the optimizer has no such setting",
    "optim/eps": "the optimizer has no such setting",
    "optim/weight_decay": "the optimizer has no such setting",
    "grad/carried": "the engine clears gradients itself, or keeps them apart",
    "activation/": "it takes probes: [modules]",
    "attention/": "it takes probes: [modules]",
    "data/": "the training does not show its batches, or they have no labels beside input_ids",
    "param/mismatch": "there is one process, or each parameter is on one rank only",
    "grad/norm/layer": "the model has no numbered layers, or they were not recorded",
    "param/norm/layer": "the model has no numbered layers, or they were not recorded",
    "system/device": "there is no accelerator",
    "train/seconds_rank_std": "there is one process, or the training does not report its loss",
    "param/untied": "the model ties no weights, or does not say which",
    "train/loss_over_chance": "the model is not a language model that names its vocabulary",
    "train/loss_tokens": "the training does not count labels",
    "train/loss_rank_std": "there is one process",
    "train/loss/total": "the training does not report its loss",
    "train/loss_before_resume": "the run is not a resume, or no loss was logged before it",
    "train/reward_bimodality": "no Trainer shows rewards of 16 answers with 5 different values",
    "train/": "the Trainer does not log it",
    "eval/": "the training does not evaluate",
}


def _why_missing(missing: Sequence[str], known: Iterable[str], *, any_of: bool) -> str:
    what = (" or " if any_of else " and ").join(missing[:2]) + (", ..." if len(missing) > 2 else "")
    reason = next((why for start, why in _ABSENT.items() if missing[0].startswith(start)), "")
    why = f": {reason}" if reason else nearest(missing[0], known)
    return f"{what} is not recorded{why}"


def _needs(rule: Rule) -> tuple[str, ...]:
    return tuple(getattr(rule, "needs", ()))


def _matches(need: str, schema: Schema) -> bool:
    if "*" not in need:
        return need in schema.index
    return any(fnmatch.fnmatchcase(name, need) for name in schema.names)


def _as_alerts(found: Any) -> list[Alert]:
    alerts = list(cast("list[Alert] | None", found) or ())  # a function may return nothing
    for alert in alerts:
        if not isinstance(alert, Alert):
            raise TypeError(f"check() returned a {type(alert).__name__}; expected um.Alert")
    return alerts


def _complete(alert: Alert, since: int) -> Alert:
    if since >= alert.step or alert.since is not None:
        return alert
    message = f"{alert.message} It began at step {since}."
    return dataclasses.replace(alert, since=since, message=message)

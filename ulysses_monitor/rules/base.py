"""What a rule is, and how a set of rules turns record history into alerts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.records import Alert, Schema, StepRecord

__all__ = ["HISTORY", "Rule", "RuleSet"]

HISTORY = 256
"""Records that a rule can look back on."""


@runtime_checkable
class Rule(Protocol):
    """A pure function of record history: the same code serves a live run and a replay."""

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


class RuleSet:
    """Runs rules over a growing history and raises each alert once.

    If a rule fired for the same metric at the step before, its alert continues and stays silent. It
    can fire again after a step at which its condition did not hold.

    Args:
        rules: the rules.
        guard: calls the rules.
    """

    def __init__(self, rules: Iterable[Rule], guard: Guard | None = None) -> None:
        self._rules = list(rules)
        self._guard = guard or Guard()
        self._history: deque[StepRecord] = deque(maxlen=HISTORY)
        self._firing: set[tuple[str, str]] = set()
        self._schemas: dict[tuple[Schema, Schema], Schema] = {}

    def observe(self, record: StepRecord) -> list[Alert]:
        """Adds `record` and returns the alerts that are new at it.

        A second record of the newest step is merged into the first: rules see whole steps.
        """
        if self._history and self._history[-1].step == record.step:
            record = self._merge(self._history.pop(), record)
        self._history.append(record)
        history = list(self._history)
        alerts = [alert for rule in self._rules for alert in self._check(rule, history)]
        new = [a for a in alerts if (a.rule, a.metric) not in self._firing]
        self._firing = {(a.rule, a.metric) for a in alerts}
        return new

    def _merge(self, first: StepRecord, second: StepRecord) -> StepRecord:
        schemas = first.schema, second.schema
        if schemas not in self._schemas:
            if len(self._schemas) >= HISTORY:
                self._schemas.clear()  # the training changes what it trains
            self._schemas[schemas] = Schema(first.schema.names + second.schema.names)
        values = np.concatenate([first.values, second.values])
        return StepRecord(first.step, first.time, self._schemas[schemas], values)

    def _check(self, rule: Rule, history: list[StepRecord]) -> list[Alert]:
        return self._guard.call(f"rule {rule.name}", lambda: _alerts(rule, history), [])


def _alerts(rule: Rule, history: list[StepRecord]) -> list[Alert]:
    found = cast("list[Alert] | None", rule.check(history))
    alerts = list(found or ())  # a function without a return gives None
    for alert in alerts:
        if not isinstance(alert, Alert):
            raise TypeError(f"check() returned a {type(alert).__name__}; expected um.Alert")
    return alerts

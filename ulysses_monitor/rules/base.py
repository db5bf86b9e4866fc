"""What a rule is, and how a set of rules turns record history into alerts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ulysses_monitor.records import Alert, Schema, StepRecord

__all__ = ["HISTORY", "Rule", "RuleSet"]

logger = logging.getLogger(__name__)

HISTORY = 256
"""Records that a rule can look back on."""

_MAX_FAILURES = 3


@runtime_checkable
class Rule(Protocol):
    """A pure function of record history: the same code serves a live run and a replay."""

    @property
    def name(self) -> str:
        """What alerts carry as `Alert.rule`."""
        ...

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """Alerts for the newest record, ``history[-1]``; must not keep state of its own.

        Args:
            history: up to `HISTORY` records of training steps, oldest first, never empty.
        """
        ...


class RuleSet:
    """Runs rules over a growing history and says each thing once.

    An alert whose rule and metric already fired at the step before is a continuation and stays
    silent; it can fire again once its condition has been gone for a step.

    Args:
        rules: the rules.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = list(rules)
        self._history: deque[StepRecord] = deque(maxlen=HISTORY)
        self._firing: set[tuple[str, str]] = set()
        self._failures: dict[str, int] = {}
        self._schemas: dict[tuple[Schema, Schema], Schema] = {}

    def observe(self, record: StepRecord) -> list[Alert]:
        """Adds `record` and returns the alerts that are new at it.

        A further record of the newest step adds to it: rules see a step whole.
        """
        if self._history and self._history[-1].step == record.step:
            record = self._joined(self._history.pop(), record)
        self._history.append(record)
        history = list(self._history)
        alerts = [alert for rule in self._rules for alert in self._check(rule, history)]
        new = [a for a in alerts if (a.rule, a.metric) not in self._firing]
        self._firing = {(a.rule, a.metric) for a in alerts}
        return new

    def _joined(self, first: StepRecord, second: StepRecord) -> StepRecord:
        schemas = first.schema, second.schema
        if schemas not in self._schemas:
            self._schemas[schemas] = Schema(first.schema.names + second.schema.names)
        values = np.concatenate([first.values, second.values])
        return StepRecord(first.step, first.time, self._schemas[schemas], values)

    def _check(self, rule: Rule, history: list[StepRecord]) -> list[Alert]:
        if self._failures.get(rule.name, 0) >= _MAX_FAILURES:
            return []
        try:
            return list(rule.check(history))  # one that returns nothing at all fails here
        except Exception:
            self._failures[rule.name] = self._failures.get(rule.name, 0) + 1
            logger.exception("monitor: rule %r failed", rule.name)
            return []

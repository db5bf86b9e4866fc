"""Events, which are rarer than steps, and alerts, the findings of rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["EVENT_KINDS", "Alert", "Event", "Severity"]

Severity = Literal["info", "warning", "critical"]

EVENT_KINDS = (
    "start",
    "stop",
    "alert",
    "action",
    "control",
    "eval",
    "answers",
    "rows",
    "rerun",
    "checkpoint",
    "monitor",
)
"""The kinds of events that the project records."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something rarer than a step: a start, a stop, an alert, an evaluation, a checkpoint.

    Attributes:
        kind: one of `EVENT_KINDS`.
        step: the last optimizer step at that time.
        time: seconds since the epoch.
        data: JSON-ready details.
    """

    kind: str
    step: int
    time: float
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule's finding: what broke, where, at which step, why, and what to try.

    Attributes:
        rule: name of the rule.
        step: step of the record that the alert is about.
        metric: name of the metric that the alert is about.
        value: value of the metric.
        threshold: the limit that the value crossed.
        message: one sentence for people.
        hint: what to try.
        severity: ``info``, ``warning`` or ``critical``.
        where: the layers, modules or parameters concerned; empty if it is the whole model.
        since: the first step of the condition, if it is not `step`.
        causes: likely causes, the most likely first.
        page: the page about the rule, as a path in the repository.
        command: words of ``ulysses control`` that the training obeys at its next step, such as
            ``save``, ``stop`` or ``policy.zclip=active``; and ``rerun``, which was done at `step`.
        rows: rows that the step trained on, the most suspicious first, as `Row.to_dict` gives them.
    """

    rule: str
    step: int
    metric: str
    value: float
    threshold: float
    message: str
    hint: str = ""
    severity: Severity = "warning"
    where: str = ""
    since: int | None = None
    causes: tuple[str, ...] = ()
    page: str = ""
    command: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()

    def to_event(self, time: float) -> Event:
        """Returns the alert as an event of kind ``alert``."""
        data: dict[str, Any] = {
            "rule": self.rule,
            "metric": self.metric,
            "value": self.value,
            "threshold": self.threshold,
            "message": self.message,
            "hint": self.hint,
            "severity": self.severity,
        }
        optional = {
            "where": self.where,
            "since": self.since,
            "causes": list(self.causes),
            "page": self.page,
            "command": list(self.command),
            "rows": [dict(row) for row in self.rows],
        }
        data |= {key: value for key, value in optional.items() if value}
        return Event(kind="alert", step=self.step, time=time, data=data)

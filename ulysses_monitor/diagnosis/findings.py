"""What the rules found in a run, one finding for each rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulysses_monitor.diagnosis.replay import RuleReplay
from ulysses_monitor.reading import RunReader
from ulysses_monitor.records.json_ready import event_to_dict
from ulysses_monitor.rules import Rule

__all__ = ["SEVERITIES", "Finding", "collect_alerts", "make_findings"]

SEVERITIES = ("critical", "warning", "info")
"""From the worst on."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: its name.
        severity: the worst of its alerts.
        metric: the metric of the first alert.
        value: the metric's value then; NaN if the run does not say.
        threshold: what the value crossed.
        where: the layers, modules or parameters of all alerts.
        message: of the first alert.
        hint: what to try.
        causes: likely causes, the most likely first.
        page: the page about the rule.
        step: the step of the first alert.
        earliest: the first step at which the condition can have held.
        since: the first step at which it was seen to hold.
        count: number of alerts.
        last: the step of the last one.
        is_replayed: whether the run did not record it, so that it comes from a replay.
    """

    rule: str
    severity: str
    metric: str
    value: float
    threshold: float
    where: str
    message: str
    hint: str
    causes: tuple[str, ...]
    page: str
    step: int
    earliest: int
    since: int
    count: int
    last: int
    is_replayed: bool

    @property
    def topic(self) -> str:
        """The rule of the project that it is an instance of, as its page says; or its own name."""
        return self.page.rpartition("/")[2].removesuffix(".md") or self.rule

    @property
    def when(self) -> str:
        """When it began, in words."""
        if self.earliest == self.step:
            return f"at step {self.step:,}"
        began = f"step {self.earliest:,}{' or later' if self.earliest < self.since else ''}"
        return f"noticed at step {self.step:,}, began at {began}"

    @property
    def badness(self) -> int:
        """0 for the worst."""
        return SEVERITIES.index(self.severity)


def collect_alerts(run: RunReader, replayed: RuleReplay) -> list[dict[str, Any]]:
    """Returns the alerts that a run recorded, and those of a replay that it has no record of.

    A rule that was active while the run trained is believed, unless the run was cut off or its
    events are damaged. Those of a replay have the key ``replayed``.
    """
    recorded = [alert for alert in run.event_list("alert") if "rule" in alert]
    known = {str(alert["rule"]) for alert in recorded}
    active, status = run.info.get("rules"), run.info.get("status")
    if isinstance(active, list) and status != "crashed" and "events.jsonl" not in run.damaged:
        known |= {str(name) for name in active}
    events = (event_to_dict(event) for event in replayed.events)
    return recorded + [alert | {"replayed": True} for alert in events if alert["rule"] not in known]


def make_findings(
    run: RunReader, alerts: Iterable[Mapping[str, Any]], rules: Sequence[Rule]
) -> list[Finding]:
    """Returns a finding for each rule with alerts, by the step that it began at."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for alert in sorted(alerts, key=lambda each: _number(each.get("step"))):
        groups.setdefault(str(alert["rule"]), []).append(alert)
    by_name = {rule.name: rule for rule in rules}
    found = [_make(run, group, by_name.get(name)) for name, group in groups.items()]
    return sorted(found, key=lambda each: (each.since, each.step))


def _make(run: RunReader, alerts: Sequence[Mapping[str, Any]], rule: Rule | None) -> Finding:
    first = alerts[0]
    step = _number(first.get("step"))
    since = min(step, _number(first.get("since"), step))
    severities = [str(alert.get("severity")) for alert in alerts]
    causes = first.get("causes")
    return Finding(
        rule=str(first["rule"]),
        severity=next((s for s in SEVERITIES if s in severities), "warning"),
        metric=str(first.get("metric", "")),
        value=_value(first.get("value")),
        threshold=_value(first.get("threshold")),
        where=", ".join(dict.fromkeys(str(a["where"]) for a in alerts if a.get("where"))),
        message=str(first.get("message", "")),
        hint=str(first.get("hint", "")),
        causes=tuple(map(str, causes)) if isinstance(causes, list) else (),
        page=str(first.get("page", "")),
        step=step,
        earliest=_find_earliest(run, rule, since),
        since=since,
        count=len(alerts),
        last=_number(alerts[-1].get("step")),
        is_replayed=bool(first.get("replayed")),
    )


def _find_earliest(run: RunReader, rule: Rule | None, since: int) -> int:
    """Returns the step after the last value with which the condition did not hold yet.

    A condition about twenty values that was seen at one of them began twenty values ago, and one
    about a metric that is sampled may have begun right after the sample before.
    """
    triggers = getattr(rule, "triggers", getattr(rule, "needs", ()))
    names = run.names(*triggers) if triggers else []
    steps = run.block(names[0]).steps if names else np.zeros(0, np.int64)
    before = steps[steps <= since][: -getattr(rule, "lasts", 1)]
    if not len(steps):
        return since
    return int(before[-1]) + 1 if len(before) else min(since, int(steps[0]))


def _number(value: object, default: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _value(value: object) -> float:
    """Returns a number of an event, which has NaN and Inf as text."""
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return math.nan

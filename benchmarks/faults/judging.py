"""What rules say about recorded trainings, and the tables of it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.faults.cases import HALVES, Case
from benchmarks.faults.training import Recorded
from ulysses_monitor.records import Alert
from ulysses_monitor.rules import RuleSet, make_rules

__all__ = ["JUDGES", "Verdict", "judge", "report", "share"]

JUDGES: dict[str, Any] = {
    "the default rules": "default",
    "loss and norm: mean + 6 s over 32 steps, NaN": [
        "nonfinite",
        {"train/loss/total > mean(32) + 6 * std(32)": {"name": "loss_6_sigma"}},
        {"grad/norm/total > mean(32) + 6 * std(32)": {"name": "norm_6_sigma"}},
    ],
    "published defaults of others": [
        "nonfinite",
        {"train/loss/total > mean(32) + 6 * std(32)": {"name": "loss_6_sigma"}},
        {"train/loss/total > 2 * mean(64) for 5": {"name": "loss_doubled"}},
        {"grad/abs_mean/total < 1e-7": {"name": "vanishing"}},
        {"optim/update_ratio/total > 10 or optim/update_ratio/total < 1e-8": {"name": "update"}},
        {"train/loss/total > 0.999 * mean(10)": {"name": "not_decreasing", "patience": 10}},
    ],
}
"""Sets of rules to compare; windows of 64 and 128 are usual, and longer than these trainings."""


@dataclass(frozen=True)
class Verdict:
    """What a set of rules said about one training.

    Attributes:
        case: the training.
        alerts: warnings and critical alerts, in order of steps.
    """

    case: Case
    alerts: Sequence[Alert]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was broken."""
        return not self.case.fault

    @property
    def after(self) -> list[Alert]:
        """The alerts from the onset on."""
        return [a for a in self.alerts if a.step >= self.case.onset]

    @property
    def right(self) -> list[Alert]:
        """Those by rules that name the cause."""
        return [a for a in self.after if a.rule in self.case.names]

    @property
    def delay(self) -> int:
        """Steps from the onset to the first right alert."""
        return self.right[0].step - self.case.onset


def judge(case: Case, recorded: Recorded, rules: Any) -> Verdict:
    """Returns what `rules` say about a training, as they would have while it ran."""
    rule_set = RuleSet(make_rules(rules))
    found = [alert for record in recorded.records for alert in rule_set.observe(record)]
    before = recorded.records[0].step - 1  # of a training that was resumed
    alerts = [_moved(alert, before) for alert in found if alert.severity != "info"]
    return Verdict(case, alerts)


def _moved(alert: Alert, by: int) -> Alert:
    return dataclasses.replace(alert, step=alert.step - by)


# -- tables ---------------------------------------------------------------------------------------


def report(verdicts: dict[str, Sequence[Verdict]]) -> str:
    """Returns the tables in Markdown.

    Args:
        verdicts: of each set of rules; the first one is ours.
    """
    ours = next(iter(verdicts.values()))
    parts = ["## Summary\n", _summary(verdicts), "\n## Each fault\n", _faults(ours)]
    parts += ["\n## Alerts on healthy runs\n", _false_alarms(ours)]
    return "\n".join(parts) + "\n"


def _summary(verdicts: dict[str, Sequence[Verdict]]) -> str:
    head = ["judged by", "trainings", "caught by any alert", "by a rule that names the cause"]
    head += ["right rule first", "median steps after onset", "healthy with a critical alert"]
    head += ["healthy with a warning", "precision"]
    rows = []
    for title, found in verdicts.items():
        is_ours = title == next(iter(verdicts))
        for name, chosen in _HALVES.items():
            rows.append(_summary_row(title, name, [v for v in found if chosen(v)], is_ours))
    return _table(head, rows)


_HALVES: dict[str, Callable[[Verdict], bool]] = {
    "sizes that thresholds were set on": lambda v: v.case.half == 0,
    "other sizes": lambda v: v.case.half == 1,
}


def _summary_row(title: str, name: str, found: Sequence[Verdict], is_ours: bool) -> list[str]:
    broken = [v for v in found if not v.is_healthy]
    healthy = [v for v in found if v.is_healthy]
    caught, right = [v for v in broken if v.after], [v for v in broken if v.right]
    first = [v for v in right if v.after[0].rule in v.case.names]
    delay = str(statistics.median(v.delay for v in right)) if right else "-"
    criticals = sum(any(a.severity == "critical" for a in v.alerts) for v in healthy)
    warned = sum(bool(v.alerts) for v in healthy)
    return [
        title,
        f"{name}: {len(broken)} broken, {len(healthy)} healthy",
        share(len(caught), len(broken)),
        share(len(right), len(broken)) if is_ours else "-",
        share(len(first), len(right)) if is_ours else "-",
        delay if is_ours else "-",
        share(criticals, len(healthy)),
        share(warned, len(healthy)),
        share(len(caught), len(caught) + warned),
    ]


def _faults(found: Sequence[Verdict]) -> str:
    rows = []
    for verdict in found:
        case = verdict.case
        if verdict.is_healthy:
            continue
        first = verdict.after[0] if verdict.after else None
        right = verdict.right[0] if verdict.right else None
        rows.append(
            [
                case.fault,
                case.kind,
                HALVES[case.half],
                f"{right.rule}, {verdict.delay}" if right else "**missed**",
                ""
                if first is None or first is right
                else f"{first.rule}, {first.step - case.onset}",
            ]
        )
    head = ["fault", "training", "size", "rule that names the cause, steps after onset"]
    return _table([*head, "first alert, if another"], rows)


def _false_alarms(found: Sequence[Verdict]) -> str:
    rows = [
        [v.case.kind, HALVES[v.case.half], a.severity, a.message]
        for v in found
        if v.is_healthy
        for a in v.alerts
    ]
    return _table(["training", "size", "severity", "alert"], rows) if rows else "None."


def share(part: int, whole: int) -> str:
    """Returns a share with its 95 % interval (Wilson)."""
    if not whole:
        return "-"
    p, z = part / whole, 1.96
    middle = (p + z**2 / (2 * whole)) / (1 + z**2 / whole)
    half = z * math.sqrt(p * (1 - p) / whole + z**2 / (4 * whole**2)) / (1 + z**2 / whole)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{part} of {whole} ({low:.0%} to {high:.0%})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

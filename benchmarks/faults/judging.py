"""What rules say about recorded trainings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.faults.cases import Case
from benchmarks.faults.hf import NOT_MONITORED
from benchmarks.faults.peers import installed_peers
from benchmarks.faults.training import Recorded
from ulysses_monitor.records import Alert
from ulysses_monitor.rules import RuleSet, make_rules

__all__ = ["JUDGES", "Verdict", "judge"]

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

JUDGES |= installed_peers()


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
    """Returns what `rules` say about a training, as they would have while it ran.

    Args:
        case: the training.
        recorded: what it recorded.
        rules: see `make_rules`; or a function of what was recorded.
    """
    if recorded.refused:  # before the first step, by the monitor itself
        said = Alert(
            rule=NOT_MONITORED,
            step=case.onset,
            metric="",
            value=0.0,
            threshold=0.0,
            message=recorded.refused,
        )
        return Verdict(case, [said] if rules == "default" else [])
    if callable(rules):
        found = rules(recorded)
    else:
        rule_set = RuleSet(make_rules(rules))
        found = [alert for record in recorded.records for alert in rule_set.observe(record)]
    before = recorded.records[0].step - 1  # of a training that was resumed
    alerts = [_moved(alert, before) for alert in found if alert.severity != "info"]
    return Verdict(case, alerts)


def _moved(alert: Alert, by: int) -> Alert:
    return dataclasses.replace(alert, step=alert.step - by)

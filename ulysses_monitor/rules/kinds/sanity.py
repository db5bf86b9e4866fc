"""Values that are wrong whatever came before."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ulysses_monitor.common.settings import Text
from ulysses_monitor.records import Alert, Severity
from ulysses_monitor.rules.builtin import BuiltinRule, worst_parameters
from ulysses_monitor.rules.history import History

__all__ = ["LossZero", "NoLabels", "NonFinite", "ReplicaDrift", "SkippedSteps"]

LOSS = "train/loss/total"
BROKEN = "grad/nonfinite/total"
LABELS = "train/loss_tokens/total"
REWARDS = ("train/reward/total", "train/reward_std/total")


@dataclass(frozen=True, kw_only=True)
class NonFinite(BuiltinRule):
    """Finds a NaN or Inf in the loss or in a gradient, and names the parameters that hold it."""

    name: Text = "nonfinite"
    severity: Severity = "critical"
    reads = (LOSS, BROKEN)
    alternatives = True

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        loss, count = history.last(LOSS), history.last(BROKEN)
        alerts = []
        if not math.isfinite(loss) and LOSS in history[-1]:
            alerts.append(self.alert(history, LOSS, loss, 0.0, f"the loss is {loss}"))
        if count > 0:
            where = worst_parameters(history[-1], "grad/nonfinite/param/")
            text = f"{count:.0f} gradient elements are NaN or Inf, in {where}"
            alerts.append(self.alert(history, BROKEN, count, 0.0, text, where=where))
        return alerts


@dataclass(frozen=True, kw_only=True)
class SkippedSteps(BuiltinRule):
    """Finds gradients that are not finite several steps in a row."""

    reads = (BROKEN,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        count = history.last(BROKEN)
        if not count > 0:
            return []
        text = f"no gradient was finite for {self.patience} steps, so no step could be taken"
        return [self.alert(history, BROKEN, count, 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class LossZero(BuiltinRule):
    """Finds a loss of exactly 0.0, except in RL, where advantages of zero give it."""

    reads = (LOSS, *REWARDS)

    @property
    def needs(self) -> tuple[str, ...]:
        """See `BuiltinRule.needs`."""
        return (LOSS,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if history.last(LOSS) != 0.0 or any(len(history.samples(name)) for name in REWARDS):
            return []
        text = "the loss is exactly 0, which a model that learns does not reach"
        return [self.alert(history, LOSS, 0.0, 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class NoLabels(BuiltinRule):
    """Finds a step without a labelled token: its loss of 0 looks like success."""

    name: Text = "no_labels"
    severity: Severity = "critical"
    reads = (LABELS,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if history.last(LABELS) != 0.0:
            return []
        text = "every label is masked, so there is nothing to learn"
        return [self.alert(history, LABELS, 0.0, 1.0, text)]


@dataclass(frozen=True, kw_only=True)
class ReplicaDrift(BuiltinRule):
    """Finds replicas of a parameter, or of a reduced gradient, that differ in any bit."""

    name: Text = "replica_drift"
    severity: Severity = "critical"
    reads = ("param/mismatch/total", "grad/mismatch/total")
    alternatives = True

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        return [self._found(history, m) for m in self.columns if history.last(m) > 0]

    def _found(self, history: History, metric: str) -> Alert:
        record, count = history[-1], history.last(metric)
        kind = metric.partition("/")[0]
        noun = {"param": "parameter", "grad": "gradient"}[kind] + ("s" if count > 1 else "")
        where = worst_parameters(record, f"{kind}/mismatch/param/")
        odd = record.get("param/odd_rank/total")
        who = "" if math.isnan(odd) else f"; rank {odd:.0f} differs from the others"
        text = f"the ranks' copies of {count:.0f} {noun} differ, in {where}{who}"
        return self.alert(history, metric, count, 0.0, text, where=where)

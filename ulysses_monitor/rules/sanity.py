"""Rules for a single step: values that are wrong whatever came before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_monitor.common.settings import Text
from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules.builtin import BuiltinRule, worst_parameters

__all__ = ["NoLabels", "NonFinite", "ReplicaDrift"]


@dataclass(frozen=True, kw_only=True)
class NonFinite(BuiltinRule):
    """Finds a NaN or Inf in the loss or in a gradient, and names the parameters that hold it."""

    name: Text = "nonfinite"

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        record, alerts = history[-1], []
        loss = record.get("train/loss/total", 0.0)
        if not math.isfinite(loss):
            alerts.append(self._alert(record, "train/loss/total", loss, f"the loss is {loss}"))
        count = record.get("grad/nonfinite/total", 0.0)
        if count:
            where = worst_parameters(record, "grad/nonfinite/param/")
            text = f"{count:.0f} gradient elements are NaN or Inf, in {where}"
            alerts.append(self._alert(record, "grad/nonfinite/total", count, text))
        return alerts

    def _alert(self, record: StepRecord, metric: str, value: float, text: str) -> Alert:
        return Alert(
            rule=self.name,
            step=record.step,
            metric=metric,
            value=value,
            threshold=0.0,
            message=f"Step {record.step}: {text}.",
            hint="Look at this step's batch; lower the learning rate; prefer bf16 to fp16.",
            severity="critical",
        )


@dataclass(frozen=True, kw_only=True)
class ReplicaDrift(BuiltinRule):
    """Finds replicas of a parameter, or of a reduced gradient, that differ in any bit."""

    name: Text = "replica_drift"

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        record = history[-1]
        return [
            self._alert(record, kind)
            for kind in ("param", "grad")
            if record.get(f"{kind}/mismatch/total", 0.0) > 0
        ]

    def _alert(self, record: StepRecord, kind: str) -> Alert:
        count = record[f"{kind}/mismatch/total"]
        noun = {"param": "parameter", "grad": "gradient"}[kind] + ("s" if count > 1 else "")
        where = worst_parameters(record, f"{kind}/mismatch/param/")
        odd = record.get("param/odd_rank/total")
        who = "" if math.isnan(odd) else f"; rank {odd:.0f} differs from the others"
        return Alert(
            rule=self.name,
            step=record.step,
            metric=f"{kind}/mismatch/total",
            value=count,
            threshold=0.0,
            message=f"Step {record.step}: the ranks' copies of {count:.0f} {noun} differ, "
            f"in {where}{who}.",
            hint="Look for random numbers or edits that differ between ranks, for a model that "
            "ranks load differently, and for faulty memory.",
            severity="critical",
        )


@dataclass(frozen=True, kw_only=True)
class NoLabels(BuiltinRule):
    """Finds a step without a labelled token: its loss of 0 looks like success."""

    name: Text = "no_labels"

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        metric = "train/loss_tokens/total"
        record = history[-1]
        if record.get(metric, 1.0) > 0:
            return []
        return [
            Alert(
                rule=self.name,
                step=record.step,
                metric=metric,
                value=0.0,
                threshold=1.0,
                message=f"Step {record.step}: every label is masked, so there is nothing to learn.",
                hint="Check the template and cutoff_len: the answers may be cut off.",
                severity="critical",
            )
        ]

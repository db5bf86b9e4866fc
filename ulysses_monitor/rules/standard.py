"""The rules that are on by default; each names its source, and none fires on a healthy start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Alert, StepRecord, column
from ulysses_monitor.rules.base import Rule

__all__ = [
    "LoraImbalance",
    "NoLabels",
    "NonFinite",
    "ReplicaDrift",
    "Spike",
    "VanishingGradient",
    "default_rules",
    "make_rules",
]


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A NaN or Inf in the loss or in a gradient; names the parameters that hold it."""

    name: str = "nonfinite"

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        record, alerts = history[-1], []
        loss = record.get("train/loss/total", 0.0)
        if not math.isfinite(loss):
            alerts.append(self._alert(record, "train/loss/total", loss, f"the loss is {loss}"))
        count = record.get("grad/nonfinite/total", 0.0)
        if count:
            where = _worst_parameters(record, "grad/nonfinite/param/")
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
class ReplicaDrift:
    """Replicas of a parameter, or of a reduced gradient, that are no longer bit by bit alike."""

    name: str = "replica_drift"

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
        what = {"param": "parameter", "grad": "gradient"}[kind] + ("s" if count > 1 else "")
        where = _worst_parameters(record, f"{kind}/mismatch/param/")
        odd = record.get("param/odd_rank/total")
        who = "" if math.isnan(odd) else f"; rank {odd:.0f} is not like the others"
        return Alert(
            rule=self.name,
            step=record.step,
            metric=f"{kind}/mismatch/total",
            value=count,
            threshold=0.0,
            message=f"Step {record.step}: the ranks' copies of {count:.0f} {what} differ, "
            f"in {where}{who}.",
            hint="Look for random numbers or edits that are not the same on every rank, for a "
            "model that ranks load differently, and for faulty memory.",
            severity="critical",
        )


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A value above mean + `sigmas` standard deviations of the last `window` steps.

    Source: OLMo-core's SkipStep (6 standard deviations over 128 steps).
    """

    metric: str
    name: str = "spike"
    sigmas: float = 6.0
    window: int = 128
    """Steps that the newest one is held against."""
    warmup: int = 64
    """Steps that must have passed before anything counts as unusual."""

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        past = column(history[-self.window - 1 : -1], self.metric)
        past = past[np.isfinite(past)]
        value = history[-1].get(self.metric)
        if len(past) < self.warmup or not math.isfinite(value):
            return []
        threshold = float(past.mean() + self.sigmas * past.std())
        if value <= threshold:
            return []
        where = f", most in {_worst_layer(history[-1])}" if self.metric == "grad/norm/total" else ""
        times = value / float(past.mean())
        message = (
            f"Step {history[-1].step}: {self.metric} is {value:.4g}, "
            f"{times:.1f} times its mean over the last {len(past)} steps{where}."
        )
        return [
            Alert(
                rule=self.name,
                step=history[-1].step,
                metric=self.metric,
                value=value,
                threshold=threshold,
                message=message,
                hint="Look at this step's batch; clip at a lower norm, or warm up for longer.",
            )
        ]


@dataclass(frozen=True, kw_only=True)
class NoLabels:
    """No token of the step carries a label: a loss of 0 that looks like success."""

    name: str = "no_labels"

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


@dataclass(frozen=True, kw_only=True)
class VanishingGradient:
    """The gradient norm stays far below its median over the oldest `reference` steps seen.

    Relative to the run itself, because an absolute threshold on the mean gradient fires on healthy
    runs as soon as the model is large.
    """

    name: str = "vanishing_gradient"
    metric: str = "grad/norm/total"
    below: float = 1e-4
    reference: int = 32
    patience: int = 10

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        values = column(history, self.metric)
        first = values[: self.reference]
        if len(values) < self.reference + self.patience or np.isnan(first).all():
            return []
        threshold = self.below * float(np.nanmedian(first))
        recent = values[-self.patience :]
        broken = column(history, "grad/nonfinite/total")[-self.patience :] > 0
        if not (recent < threshold).all() or broken.any():  # NaN is not counted in the norm
            return []
        record = history[-1]
        return [
            Alert(
                rule=self.name,
                step=record.step,
                metric=self.metric,
                value=float(recent[-1]),
                threshold=threshold,
                message=f"Step {record.step}: the gradient norm has been below {threshold:.3g} "
                f"for {self.patience} steps.",
                hint="Check that the loss depends on the trained parameters and that they are not "
                "frozen; raise the learning rate.",
            )
        ]


@dataclass(frozen=True, kw_only=True)
class LoraImbalance:
    """One side of the adapters gets almost all of the gradient, for `patience` steps.

    The ratio is infinite at the first step, where B = 0 keeps A's gradient at zero, and falls over
    about a hundred steps on a healthy run; so it is looked at only after `warmup` steps.
    """

    name: str = "lora_imbalance"
    metric: str = "lora/grad_ratio_B_A/total"
    low: float = 0.02
    high: float = 50.0
    warmup: int = 100
    patience: int = 20

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        record = history[-1]
        recent = column(history[-self.patience :], self.metric)
        if record.step <= self.warmup or len(recent) < self.patience or np.isnan(recent).any():
            return []
        low, high = bool((recent < self.low).all()), bool((recent > self.high).all())
        if not (low or high):
            return []
        side = "A" if high else "B"
        return [
            Alert(
                rule=self.name,
                step=record.step,
                metric=self.metric,
                value=float(recent[-1]),
                threshold=self.high if high else self.low,
                message=f"Step {record.step}: LoRA's {side} side has hardly had a gradient for "
                f"{self.patience} steps (B/A is {recent[-1]:.3g}).",
                hint="Try LoRA+ (a higher rate for B), another initialisation, or a higher rate.",
            )
        ]


def default_rules() -> list[Rule]:
    """The rules that ``rules="default"`` means."""
    return [
        NonFinite(),
        NoLabels(),
        ReplicaDrift(),
        Spike(metric="train/loss/total", name="loss_spike"),
        Spike(metric="grad/norm/total", name="gradient_spike"),
        VanishingGradient(),
        LoraImbalance(),
    ]


def make_rules(rules: Literal["default"] | Iterable[Rule]) -> list[Rule]:
    """`rules` as a list.

    Raises:
        InputError: another word than ``"default"``, or an object that is no rule.
    """
    if isinstance(rules, str):
        if rules != "default":
            raise InputError(f"monitor: rules={rules!r}; allowed is 'default' or a list of rules")
        return list(default_rules())
    checked = list(rules)
    for rule in checked:
        if not isinstance(rule, Rule):
            raise InputError(f"monitor: rule {type(rule).__name__} has no name and check method")
    return checked


def _worst_parameters(record: StepRecord, prefix: str, most: int = 3) -> str:
    """Names of the parameters with the largest values under `prefix`."""
    found = [(record[n], n.removeprefix(prefix)) for n in record.schema.match(f"{prefix}*")]
    found = sorted((pair for pair in found if pair[0]), reverse=True)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(name for _, name in found[:most]) + more


def _worst_layer(record: StepRecord) -> str:
    names = record.schema.match("grad/norm/layer/*")
    return max(names, key=lambda n: record[n]).removeprefix("grad/norm/") if names else "no layer"

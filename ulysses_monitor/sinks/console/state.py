"""The state of a run that the console sink shows: position, numbers, alerts."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.nonfinite import COUNT
from ulysses_monitor.sinks.selection import Selection

__all__ = ["EVERY_STEP", "SAMPLED", "WATCHED", "AlertLine", "RunState"]

LOSS, NORM, SECONDS = "train/loss/total", "grad/norm/total", "train/step_seconds/total"
HELD_OUT = "eval/loss/total"

EVERY_STEP = {
    LOSS: ("loss", "{:.3f}"),
    NORM: ("gradient norm", "{:.3g}"),
    "grad/clip_coef/total": ("clip coefficient", "{:.3g}"),
    "train/tokens_per_second/total": ("tokens/s", "{:,.0f}"),
    SECONDS: ("seconds per step", "{:.3g}"),
    "train/mfu/total": ("utilisation", "{:.1%}"),
    "lora/grad_ratio_B_A/total": ("LoRA B/A gradient", "{:.3g}"),
}
"""Label and format of the metrics of every step."""

SAMPLED = {
    "optim/update_ratio/total": ("update ratio", "{:.3g}"),
    "lora/delta_ratio/total": ("LoRA |BA| / |W|", "{:.3g}"),
    "lora/stable_rank/total": ("LoRA stable rank", "{:.3g}"),
    "param/norm/total": ("weight norm", "{:.4g}"),
}
"""Label and format of the sampled metrics."""

RATES, DROPPED = "optim/lr/*", "monitor/dropped_records/*"

WATCHED = (*EVERY_STEP, *SAMPLED, HELD_OUT, RATES, DROPPED, COUNT)
"""Patterns of all metrics that the state uses."""

_REMEMBERED = 400
_ALERTS = 3


@dataclass(frozen=True)
class AlertLine:
    """An alert as the table shows it: step, severity and one line of text."""

    step: int
    severity: str
    text: str


class RunState:
    """Gathers what people want to see from records and events.

    Attributes:
        name: name of the run; may be empty.
        engine: the engine and the number of processes, in words.
        total: number of steps that the run will take; None if unknown.
        step: number of the last step.
        values: last value of each metric, by name.
        sampled_at: step of the last sampled metrics.
        losses: losses of the last steps.
        norms: gradient norms of the last steps.
        held_out: step and loss of the last evaluation.
        alerts: the last alerts.
        alert_count: number of all alerts.
        dropped: number of records that each sink lost, if any.
        rates: learning rates, each once.
        status: how the run ended; empty while it trains.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.engine = ""
        self.total: int | None = None
        self.step = 0
        self.values: dict[str, float] = {}
        self.sampled_at = 0
        self.losses: deque[float] = deque(maxlen=_REMEMBERED)
        self.norms: deque[float] = deque(maxlen=_REMEMBERED)
        self.held_out: tuple[int, float] | None = None
        self.alerts: deque[AlertLine] = deque(maxlen=_ALERTS)
        self.alert_count = 0
        self._last_action_step: dict[tuple[str, str], int] = {}
        self._is_new_action = False
        self.dropped: dict[str, float] = {}
        self.rates: tuple[float, ...] = ()
        self.status = ""
        self._seconds: deque[float] = deque(maxlen=50)
        self._rates, self._drops = Selection([RATES]), Selection([DROPPED])

    def seconds_left(self) -> float | None:
        """Returns the seconds to the end at the pace of the last 50 steps, or None."""
        if not self.total or not self._seconds:
            return None
        return max(0, self.total - self.step) * sum(self._seconds) / len(self._seconds)

    def ends_broken(self) -> bool:
        """Returns whether the last loss or gradient norm is NaN or Inf."""
        return any(not math.isfinite(self.values.get(name, 0.0)) for name in (LOSS, NORM))

    def is_new_action(self, event: Event) -> bool:
        """Returns whether the event, which was added last, is an action new to its policy.

        It is not if the policy took the same action at the step before.
        """
        return event.kind == "action" and self._is_new_action

    def add(self, item: StepRecord | Event) -> None:
        """Takes a record or an event into account."""
        if isinstance(item, StepRecord):
            self._add_record(item)
        elif item.kind == "start":
            self._start(item.step, item.data)
        elif item.kind == "alert":
            self.alert_count += 1
            severity = str(item.data.get("severity", ""))
            self.alerts.append(AlertLine(item.step, severity, alert_text(item)))
        elif item.kind == "action":
            # A policy may act at every step; only its first action deserves a line.
            key = str(item.data.get("policy")), str(item.data.get("action"))
            self._is_new_action = self._last_action_step.get(key, -2) < item.step - 1
            self._last_action_step[key] = item.step
        elif item.kind == "stop":
            self.status = str(item.data.get("status", "finished"))

    def _start(self, step: int, data: Any) -> None:
        self.step, self.status = step, ""
        self.total = as_count(data.get("max_steps"))
        self.engine = engine_text(data)

    def _add_record(self, record: StepRecord) -> None:
        if HELD_OUT in record:
            self.held_out = record.step, record[HELD_OUT]
        if SECONDS in record:
            self.step = record.step
            if math.isfinite(record[SECONDS]):
                self._seconds.append(record[SECONDS])
            self.losses.append(record.get(LOSS))
            self.norms.append(shown_value(record, NORM))
            self.rates = tuple(dict.fromkeys(v for _, v in self._rates.items(record)))
            self.dropped |= {n.split("/", 2)[2]: v for n, v in self._drops.items(record) if v > 0}
        self.values |= {name: shown_value(record, name) for name in EVERY_STEP if name in record}
        sampled = {name: record[name] for name in SAMPLED if name in record}
        if sampled:
            self.values |= sampled
            self.sampled_at = record.step


def shown_value(record: StepRecord, name: str) -> float:
    """Returns a value to show; a gradient norm that left out NaN and Inf is NaN."""
    is_partial = name == NORM and record.get(COUNT) > 0
    return math.nan if is_partial else record.get(name)


def alert_text(event: Event) -> str:
    """Returns an alert in one line: rule, message, hint."""
    data = event.data
    return f"{data.get('rule', 'alert')}: {data.get('message', '')} {data.get('hint', '')}".strip()


def action_text(event: Event) -> str:
    """Returns a policy's action in one line."""
    data = event.data
    would = " would" if data.get("mode") == "shadow" else ""
    return f"policy {data.get('policy')}{would}: {data.get('action')}, {data.get('reason')}"


def control_text(event: Event) -> str:
    """Returns a person's command and its answer in one line."""
    data = event.data
    if "who" not in data:
        return f"ignored a command: {data.get('refused')}"
    why = f" ({data['why']})" if data.get("why") else ""
    answer = f", refused: {data['refused']}" if "refused" in data else ""
    return f"{data['who']}: {data.get('command')}{why}{answer}"


def engine_text(data: Any) -> str:
    """Returns engine and number of processes, from the data of a start event."""
    processes = as_count(data.get("world_size")) or 1
    return f"{data.get('engine', '?')}, {processes} process{'es' if processes > 1 else ''}"


def as_count(value: Any) -> int | None:
    """Returns `value` as a positive integer, or None; data frames turn integers into floats."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 1:
        return None
    return int(value)

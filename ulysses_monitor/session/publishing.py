"""Turns what a step measured into records, alerts and events, and hands them to the recorder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.capture import CapturedStep, Part
from ulysses_monitor.records import Alert, Event, Metric, StepRecord, schema_of
from ulysses_monitor.rules import RuleSet
from ulysses_monitor.session.flops import TrainingFlops
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.recording import NoRecording, Recorder
from ulysses_monitor.session.training_step import RecordBuilder, TrainingStep, as_part

__all__ = ["Publisher"]


class Publisher:
    """Publishes the records of steps, and the alerts that rules raise for them.

    Args:
        rules: see every record.
        engine: what is trained.
        obey: takes what alerts ask of the training.
        guard: calls it.
        name_rows: returns an alert with the rows of its step.

    Attributes:
        recorder: takes everything; until the run is open, nothing is recorded.
    """

    def __init__(
        self,
        rules: RuleSet,
        engine: Engine,
        obey: Callable[[Alert], None],
        guard: Guard,
        name_rows: Callable[[Alert], Alert],
    ) -> None:
        self.recorder: Recorder = NoRecording()
        self._rules, self._engine = rules, engine
        self._obey, self._guard, self._name_rows = obey, guard, name_rows
        self._flops = TrainingFlops.of(engine.model)
        self._builder = RecordBuilder()
        self._last_publish = 0.0
        self._last_step: int | None = None

    def build(self, parts: Sequence[Part], step: int) -> StepRecord:
        """Joins parts to the record of `step`."""
        return self._builder.build(parts, step)

    def publish(self, parts: Sequence[Part], step: int) -> None:
        """Publishes the record of `step`, and the alerts that rules raise for it."""
        record = self.build(parts, step)
        self.recorder.publish(record)
        self._last_step = step
        self._check(record)

    def _check(self, record: StepRecord) -> None:
        for found in self._rules.observe(record):
            alert = self._guard.call("naming rows", partial(self._name_rows, found), found)
            self.recorder.publish(alert.to_event(record.time))
            part = f"what rule {alert.rule} asks for"
            self._guard.call(part, partial(self._obey, alert), None)

    def publish_read(
        self,
        captured: CapturedStep,
        current: TrainingStep,
        events: Sequence[Event],
        step: int,
    ) -> None:
        """Publishes what reading a step told, and completes its parts.

        Args:
            captured: what was read; its `previous_parts` are of the step before.
            current: the step that was read.
            events: what policies and people did.
            step: number of the step before.
        """
        if captured.previous_parts:
            self.publish(captured.previous_parts, step)
        captured.parts.append(as_part(current.metrics(self._engine)))
        for event in events:
            self.recorder.publish(event)

    def publish_step(self, current: TrainingStep, parts: Sequence[Part], step: int) -> None:
        """Publishes the record of a step that ended, with its times."""
        began = time.perf_counter()
        times = current.times(began - current.began, self._flops, self._engine.device)
        times |= current.clip_metrics(current.clip_norm)
        times["monitor/overhead_seconds/total"] = current.overhead + self._last_publish
        for sink, count in self.recorder.dropped().items():
            times[f"monitor/dropped_records/{sink}"] = float(count)
        self.publish([*current.valid_parts(parts), as_part(times)], step)
        # Known only now, so the next record carries it.
        self._last_publish = time.perf_counter() - began

    def publish_rows(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Publishes the rows of steps that alerts are about."""
        for about in found:
            self.publish_event("rows", about, about["of_step"])

    def publish_numbers(self, metrics: Mapping[str, float], step: int) -> None:
        """Publishes further metrics of `step`; rules see them if they saw the step.

        The scope ``total`` may be left out: ``my/metric`` is ``my/metric/total``.

        Raises:
            InputError: a name is not ``family/stat/scope``.
        """
        names = tuple(
            Metric(name=f"{name}/total" if name.count("/") == 1 else name).name for name in metrics
        )
        if names:
            values = np.array([float(value) for value in metrics.values()], np.float64)
            record = StepRecord(step, time.time(), schema_of(names), values)
            self.recorder.publish(record)
            if step == self._last_step:
                self._guard.call("checking logged numbers", partial(self._check, record), None)

    def close(self, status: Status, step: int, about: Mapping[str, Any]) -> None:
        """Ends the run; see `Recorder.close`. run.json says which rules could not be checked."""
        if self.recorder.is_recording:
            self.recorder.describe({"rules_not_checked": self._rules.unchecked()})
        self.recorder.close(status, step, about)

    def publish_event(self, kind: str, data: Mapping[str, Any], step: int) -> None:
        """Publishes an event at `step`."""
        self.recorder.publish(Event(kind=kind, step=step, time=time.time(), data=data))

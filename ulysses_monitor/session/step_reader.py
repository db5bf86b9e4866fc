"""Reads one step of a session and steers it: what every rank does before the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes import FollowingCapture
from ulysses_monitor.records import Alert, Event, StepRecord
from ulysses_monitor.session.publishing import Publisher
from ulysses_monitor.session.rows import RowLog
from ulysses_monitor.session.sources import Sources
from ulysses_monitor.session.step_inputs import StepInputs
from ulysses_monitor.session.training_step import TrainingStep, as_part
from ulysses_monitor.steering import Steering
from ulysses_monitor.steering.rerun import Rerun

__all__ = ["StepReader", "explainer"]


class StepReader:
    """Reads the gradients of steps, lets policies and people act, and publishes what they did.

    Args:
        engine: what is trained.
        capture: reads the engine.
        steering: acts on it.
        publisher: publishes.
        sources: metrics of every step from elsewhere.
        inputs: what goes into each step beside its loss.
        rows: the rows that steps train on.
        guard: calls what publishes.

    Attributes:
        rerun: computes a step again where an alert asks for it; None if none does.
    """

    def __init__(
        self,
        engine: Engine,
        capture: FollowingCapture,
        steering: Steering,
        publisher: Publisher,
        sources: Sources,
        inputs: StepInputs,
        rows: RowLog,
        guard: Guard,
    ) -> None:
        self._engine, self._capture, self._steering = engine, capture, steering
        self._publisher, self._sources, self._inputs = publisher, sources, inputs
        self._rows, self._guard = rows, guard
        self.rerun: Rerun | None = None
        self._is_first = True

    def read(self, step: TrainingStep, last: int) -> InputError | None:
        """Reads the step and steers it; every rank calls it.

        Args:
            step: gets what was read.
            last: number of the step before.

        Returns:
            Why a policy cannot act, before the first step.
        """
        sources = self._sources.read()
        own = step.observed() | sources | self._inputs.take_sums()
        own |= self._steering.collect_sums() | self._rows.collect_sums()
        captured = self._capture.read(last + 1, own)
        step.parts, step.sums = captured.parts, captured.extra
        step.sources = {n: step.sums[n] for n in sources} | self._inputs.metrics(step, last + 1)
        self._publisher.publish_rows(self._rows.end_reading(last + 1, step.sums))
        self._compute_again(step, last + 1)
        try:
            events = self._steer(step, last + 1)
        except InputError as error:
            return error
        finally:
            self._is_first = False
        if self._publisher.recorder.is_recording:
            step.edited_norm = self._steering.edited_norm
            publish = self._publisher.publish_read
            self._guard.call("recording", lambda: publish(captured, step, events, last), None)
        return None

    def _make_record(self, step: TrainingStep, number: int) -> StepRecord:
        """Makes the record of what is known before the optimizer's step."""
        own = as_part(step.metrics(self._engine))
        return self._publisher.build([*(step.parts or ()), own], number)

    def _compute_again(self, step: TrainingStep, number: int) -> None:
        """Computes the step again if an alert asks for it; on every rank, with the same numbers."""
        if self.rerun is not None:
            look = partial(self.rerun.look, partial(self._make_record, step, number))
            about = self._guard.call("computing a step again", look, None, stays_on=True)
            if about is not None:
                self._publisher.publish_event("rerun", about, number)

    def _steer(self, step: TrainingStep, number: int) -> list[Event]:
        """Lets policies and people act; on every rank, with the same numbers."""
        make = partial(self._make_record, step, number)
        try:
            return self._steering.steer(make, step.sums, self._capture.names)
        except TrainingStoppedError:
            raise
        except Exception as error:
            if isinstance(error, InputError) and self._is_first:
                raise  # a policy that cannot act
            self._guard.note_failure("steering", error, is_last=True)
            self._steering.turn_off()
            return []


def explainer(rows: RowLog, rerun: Rerun | None) -> Callable[[Alert], Alert]:
    """Returns a function that adds to an alert what is known of its step.

    That is the rows that the step trained on, and what computing it again showed.
    """

    def explain(alert: Alert) -> Alert:
        alert = rows.name_in(alert)
        verdict = "" if rerun is None else rerun.explain(alert)
        return replace(alert, message=f"{alert.message} {verdict}") if verdict else alert

    return explain

"""Reads one step of a session and steers it: what every rank does before the optimizer's step."""

from __future__ import annotations

from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes import FollowingCapture
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.session.publishing import Publisher
from ulysses_monitor.session.rows import RowLog
from ulysses_monitor.session.sources import Sources
from ulysses_monitor.session.training_step import TrainingStep, as_part
from ulysses_monitor.steering import Steering

__all__ = ["StepReader"]


class StepReader:
    """Reads the gradients of steps, lets policies and people act, and publishes what they did.

    Args:
        engine: what is trained.
        capture: reads the engine.
        steering: acts on it.
        publisher: publishes.
        sources: metrics of every step from elsewhere.
        rows: the rows that steps train on.
        guard: calls what publishes.
    """

    def __init__(
        self,
        engine: Engine,
        capture: FollowingCapture,
        steering: Steering,
        publisher: Publisher,
        sources: Sources,
        rows: RowLog,
        guard: Guard,
    ) -> None:
        self._engine, self._capture, self._steering = engine, capture, steering
        self._publisher, self._sources, self._rows = publisher, sources, rows
        self._guard = guard
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
        own = step.observed() | sources | self._steering.collect_sums() | self._rows.collect_sums()
        captured = self._capture.read(last + 1, own)
        step.parts, step.sums = captured.parts, captured.extra
        step.sources = {name: step.sums[name] for name in sources}
        self._publisher.publish_rows(self._rows.end_reading(last + 1, step.sums))
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

    def _steer(self, step: TrainingStep, number: int) -> list[Event]:
        """Lets policies and people act; on every rank, with the same numbers."""

        def make_record() -> StepRecord:
            own = as_part(step.metrics(self._engine))
            return self._publisher.build([*(step.parts or ()), own], number)

        try:
            return self._steering.steer(make_record, step.sums, self._capture.names)
        except TrainingStoppedError:
            raise
        except Exception as error:
            if isinstance(error, InputError) and self._is_first:
                raise  # a policy that cannot act
            self._guard.note_failure("steering", error, is_last=True)
            self._steering.turn_off()
            return []

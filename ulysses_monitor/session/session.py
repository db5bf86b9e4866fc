"""One open run: wires engine, probes, steering, rules and recording; knows no Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.engines import Engine, do_nothing
from ulysses_monitor.probes import FollowingCapture
from ulysses_monitor.rules import RuleSet
from ulysses_monitor.session.clipping import Clipping
from ulysses_monitor.session.failure import FailureWatch, peak_memory
from ulysses_monitor.session.opening import (
    Training,
    make_steering,
    open_recorder,
    restore_memory,
)
from ulysses_monitor.session.places import Place
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.publishing import Publisher
from ulysses_monitor.session.rows import RowLog
from ulysses_monitor.session.settings import MonitorSettings, Parts
from ulysses_monitor.session.sources import Sources
from ulysses_monitor.session.step_inputs import StepInputs
from ulysses_monitor.session.step_reader import StepReader, explainer
from ulysses_monitor.session.training_step import TrainingStep
from ulysses_monitor.steering.rerun import make_rerun

__all__ = ["Session"]

_T = TypeVar("_T")
_D = TypeVar("_D")


class Session:
    """One open run, from its directory's opening to its close; every rank has one.

    One step, with every event marked::

        step_begins()       # the step's batches are there
        forward, backward   # observe(loss=..., tokens=..., loss_tokens=...) for each micro-batch
        gradients_ready()   # reduced, unclipped: probes, ONE all-reduce, ONE copy to the host;
                            # policies decide and act
        engine clips, steps
        stepped(done)       # reads what the step did; it travels with the next step's vector
        step_ends()         # the record gets its times and goes to rules and to the bus
        take_requests()     # what policies or people ask of whoever trains: save, stop

    `gradients_ready` and `stepped` run on every rank; records, rules and sinks live on rank 0.

    Args:
        place: where to record.
        settings: how to record.
        parts: what `settings` made.
        engine: the engine view to read.
        training: what is known of the training.
        config: what the user configured, for run.json.

    Attributes:
        run_dir: the run directory.
        step: the last step that ended.
        stopped: why a policy or a person stopped the training, None if they did not.
        is_open: whether the run is still recorded.
        sources, inputs: metrics from elsewhere; what goes into each step beside its loss.
        rows: sees the rows of every step.
        guard: calls what runs inside the training.
        failure: takes the exception that ends the training.

    Raises:
        InputError: the run directory is taken, or policies contradict one another or their state.
    """

    def __init__(
        self,
        place: Place,
        settings: MonitorSettings,
        parts: Parts,
        engine: Engine,
        training: Training,
        config: Mapping[str, Any],
    ) -> None:
        self.run_dir = place.run_dir
        self.step = training.step
        self.stopped: str | None = None
        self.is_open = True
        self.failure = FailureWatch()
        self._engine = engine
        guard = self.guard = Guard(lambda about: self.event("monitor", about))
        self._steering = make_steering(engine, settings, parts, training, guard)
        obey, rules = self._steering.inbox.obey, RuleSet(parts.rules, guard)
        self.rows = RowLog(settings.rows, engine, guard)
        rerun = make_rerun(engine, parts.rules, training.no_rerun, guard)
        self._publisher = Publisher(rules, engine, obey, guard, explainer(self.rows, rerun))
        self.sources = Sources(guard)
        special = training.special_tokens
        self.inputs = StepInputs(engine, guard, settings.sample_every, special)
        self._current = TrainingStep()
        self._clipping = Clipping(engine, self.gradients_ready, guard, self.event)
        self._capture = FollowingCapture(
            engine,
            settings.sample_every,
            lambda: self.step + 1,
            guard,
            self.event,
            self.rows.probes,
            [probe.make for probe in parts.probes],
        )
        self._reader = StepReader(
            engine,
            self._capture,
            self._steering,
            self._publisher,
            self.sources,
            self.inputs,
            self.rows,
            guard,
        )
        self._reader.rerun = rerun
        self._undos: list[Undo] = [self._capture.close, self._steering.end_step, self.inputs.close]
        if rerun is not None:
            self._undos.append(rerun.close)
        try:
            self._publisher.recorder, self.run_dir = open_recorder(
                place, settings, parts, engine, training, config, on_exit=self.close
            )
            self.rows.open(self.run_dir)
            if self._publisher.recorder.is_recording:
                self._steering.listen(self.run_dir)
                self.failure.log.start()
            self._start(parts, training)
        except BaseException:
            self.close("failed")
            raise

    # -- the life of a run -------------------------------------------------------------------

    def _start(self, parts: Parts, training: Training) -> None:
        """Records the start and restores what policies remembered at the checkpoint."""
        modes = {"policies": self._steering.modes} if parts.policies else {}
        about = {"engine": self._engine.name, "world_size": world_size(), **modes}
        self.event("start", {**about, "max_steps": training.max_steps})
        self._capture.announce()
        if missing := restore_memory(self._steering, parts, training):
            self.event("monitor", {"policies_anew": missing})

    def hook_step(
        self, ended: Callable[[], None] = do_nothing, *, sees_clipping: bool = False
    ) -> None:
        """Hooks the engine's step until the session closes: reading, acting, and `ended`.

        Args:
            ended: see `Engine.hook_step`.
            sees_clipping: whether to look at how the training clips; not where a Trainer clips.
        """
        hook, gate, read = self._engine.hook_step, self._steering.gate, self._clipping.enter_step
        self._undos.append(gate.install(lambda: hook(read, self.stepped, ended)))
        if sees_clipping:
            self._undos.append(self._clipping.install())

    def close(self, status: Status = "finished") -> None:
        """Removes every hook, writes everything out, ends the run; safe to call twice."""
        undo_all(self._undos)
        if self.is_open:
            self.is_open = False
            why = {"reason": self.stopped} if self.stopped else {}
            self._publisher.publish_rows(self.rows.close())
            failure = self.failure.finish(status)
            about = {**why, **failure, "peak_memory": peak_memory(self._engine.device)}
            self._publisher.close(status, self.step, about)

    def guarded(self, part: str, function: Callable[[], _T], default: _D) -> _T | _D:
        """Calls `function`, which runs inside the user's training; returns `default` if it raises.

        The first failure of a part is logged with its traceback and is an event. The part is called
        again however often it fails, because other ranks may wait for what it does.

        Raises:
            TrainingStoppedError: `function` asked for it.
        """
        return self.guard.call(part, function, default, stays_on=True)

    # -- one step ----------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Marks the start of a step's clock; without it a step starts where the last one ended."""
        self._current.began = time.perf_counter()

    def observe(
        self,
        *,
        loss: Tensor | float | None = None,
        tokens: Tensor | float = 0.0,
        loss_tokens: Tensor | float | None = None,
        attended: Tensor | float = 0.0,
        batch: Any = None,
        row_losses: Tensor | None = None,
    ) -> None:
        """Adds a micro-batch of the coming step; see `Monitor.observe`."""
        if self._current.was_read:
            self._clipping.note_late_batch()
        self._current.observe(loss, tokens, loss_tokens, attended)
        self.inputs.see_loss(loss, self.step + 1)
        if batch is not None:
            self.rows.give(batch, row_losses)
            self.inputs.see_batch(batch)

    def miss(self, *, loss: bool = False, counts: bool = False) -> None:
        """Notes that a micro-batch could not be read; see `TrainingStep.miss`."""
        self._current.miss(loss=loss, counts=counts)

    def before_clip(self) -> None:
        """Reads the gradients now unless the engine clips within its own step."""
        self._clipping.before_clip()

    def gradients_ready(self) -> None:
        """Reads the step: probes, one all-reduce, one copy. All ranks; once per step.

        Raises:
            InputError: before the first step, a policy that the user named cannot act.
            TrainingStoppedError: a policy asked for it.
        """
        step, began = self._current, time.perf_counter()
        if step.was_read:
            return
        step.was_read = True
        refusal = self.guarded(
            "reading the gradients", lambda: self._reader.read(step, self.step), None
        )
        step.overhead += time.perf_counter() - began
        if refusal is not None:
            raise refusal

    def stepped(self, done: bool = True) -> None:
        """Reads what the optimizer step did, before a scheduler changes its settings.

        Args:
            done: false if the step was skipped for an overflow.
        """
        began = time.perf_counter()

        def finish() -> None:
            was_skipped = self._steering.end_step()
            self._capture.finish_step(done and not was_skipped)
            self.inputs.end_step()

        self.guarded("reading the optimizer's step", finish, None)
        self._current.overhead += time.perf_counter() - began

    def step_ends(self, step: int | None = None) -> None:
        """Completes and publishes the step's record.

        Args:
            step: the step's number if the caller counts; otherwise the last one plus 1.
        """
        current, self._current = self._current, TrainingStep()
        current.clip_norm, current.is_stale = self._clipping.end_step()
        self.step = self.step + 1 if step is None else step
        publish, parts, at = self._publisher.publish_step, current.parts, self.step
        if parts is not None and self._publisher.recorder.is_recording:
            self.guard.call("recording", lambda: publish(current, parts, at), None)
        self._current.began = time.perf_counter()

    def take_requests(self) -> dict[str, str]:
        """Returns what policies or people ask of the training: ``save``, ``stop``, and why.

        The answer is the same on all ranks. Call it once at the end of each step.
        """
        requests, self._steering.requests = self._steering.requests, {}
        self.stopped = requests.get("stop", self.stopped)
        return requests

    # -- what happens between steps ------------------------------------------------------------

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Records an event at the current step."""
        self._publisher.publish_event(kind, data, self.step)

    def describe(self, info: Mapping[str, Any]) -> None:
        """Adds entries to run.json."""
        self._publisher.recorder.describe(info)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Records further metrics of the current step; see `Monitor.log`."""
        self._publisher.publish_numbers(metrics, self.step)

    def policy_state(self) -> bytes | None:
        """Returns what policies remember, to be kept with a checkpoint of this step.

        Every rank calls it. None if there is nothing to remember.
        """
        self._steering.note_checkpoint(self.step)
        return self._steering.to_bytes() if self._steering.has_state else None

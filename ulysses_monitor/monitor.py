"""The monitor: wires engine, probes, rules, bus and sinks; knows no Trainer.

One step, with every event marked::

    step_begins()          # the step's batches are there
    forward, backward      # observe(loss=..., tokens=..., loss_tokens=...) for each micro-batch
    gradients_ready()      # reduced, unclipped: probes, ONE all-reduce, ONE copy to the host;
                           # policies decide and act
    engine clips, steps
    stepped(done)          # what the step did is looked at; it travels with the next one's vector
    step_ends()            # the record gets its times, goes to rules and to the bus

`gradients_ready` and `stepped` run on every rank; records, rules and sinks live on rank 0.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ulysses_monitor.common.environment import describe_environment
from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.common.ranks import agree_or_raise, rank, world_size
from ulysses_monitor.engines import AfterStep, Engine, find_engine, nothing
from ulysses_monitor.policies import make_policies
from ulysses_monitor.probes import Capture, assemble
from ulysses_monitor.probes.capture import Part
from ulysses_monitor.records import Event, Metric, Mode, Schema, StepRecord, schema_of
from ulysses_monitor.rules import RuleSet, make_rules
from ulysses_monitor.session.flops import TrainingFlops, numel
from ulysses_monitor.session.lifecycle import AtTheEnd, Status
from ulysses_monitor.session.recording import Recording
from ulysses_monitor.session.training_step import TrainingStep, as_part
from ulysses_monitor.sinks import Sink, make_sinks
from ulysses_monitor.steering import Steered, Steering
from ulysses_monitor.store import IfExists, check_mirror

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)

Source = Callable[[], Sequence[float]]


class Monitor:
    """Watches one training run and records it in a run directory.

    Attach it to a Trainer with `attach`, or watch a plain loop with `watch`.

    Args:
        run_dir: the run directory, such as ``runs/demo``.
        sinks: sinks beside the run store and TensorBoard: objects with `write`, `flush`, `close`,
            or what `ulysses_monitor.sinks.make_sinks` makes of names, such as ``"jsonl"``.
        rules: ``"default"``, ``"off"``, or what `ulysses_monitor.rules.make_rules` takes.
        policies: what acts on a step before its gradients are clipped: a preset such as
            ``"ulysses-pro"``, the path of a YAML file, or a list of what
            `ulysses_monitor.policies.make_policies` takes: names with settings, objects with a
            `name` and `decide(history)`, functions of the history, that give `um.Action`s.
        shadow: policies decide and are recorded, and touch nothing.
        seed: of the policies' noise.
        tensorboard: whether to write TensorBoard files.
        mirror: a URL, such as ``s3://bucket/runs/demo``, that gets a copy of the run directory
            while it is written.
        sample_every: optimizer state, parameters, adapters, updates and the likeness of replicas
            are looked at in steps 1, 1 + N, 1 + 2N, ...
        if_exists: ``refuse``, ``resume`` or ``overwrite`` a run that is there already; a training
            that resumes from a checkpoint continues the run in any case.
        config: what the user configured, for run.json.

    Raises:
        InputError: an argument is wrong; at the start of training, the directory is taken or the
            engine is not supported.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        sinks: Sequence[Sink | str | Mapping[str, Any]] = (),
        rules: str | Iterable[Any] = "default",
        policies: str | Sequence[Any] = (),
        shadow: bool = False,
        seed: int = 0,
        tensorboard: bool = True,
        mirror: str | None = None,
        sample_every: int = 10,
        if_exists: IfExists = "refuse",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        _check_settings(run_dir, sample_every, if_exists, mirror)
        self.run_dir = Path(run_dir)
        self._sinks = make_sinks(sinks)
        self._given_rules = make_rules(rules)
        self._rules = RuleSet(self._given_rules)
        self._policies = make_policies(policies)
        self._mode: Mode = "shadow" if shadow else "active"
        self._seed = seed
        self._steering: Steering | None = None
        self._state: bytes | None = None
        self._tensorboard = tensorboard
        self._sample_every = sample_every
        self._if_exists: IfExists = if_exists
        self._config = dict(config or {})
        self._undos: list[Undo] = []
        self._mirror = mirror
        self._recording: Recording | None = None
        self._end: AtTheEnd | None = None
        self._capture: Capture | None = None
        self._flops: TrainingFlops | None = None
        self._sources: list[tuple[tuple[str, ...], Source]] = []
        self._schemas: dict[tuple[Schema, ...], Schema] = {}
        self._broken = self._warned = False
        self._current = TrainingStep()
        self._last_publish = 0.0
        self.step = 0
        self.stopped: str | None = None

    # -- attaching ---------------------------------------------------------------------------

    def attach(self, trainer: Any) -> None:
        """Watches a HF or TRL Trainer: adds a `MonitorCallback` bound to it.

        Raises:
            InputError: `trainer` is not a `transformers.Trainer`.
        """
        from ulysses_monitor.integrations.callback import attach

        attach(self, trainer)

    @contextmanager
    def watch(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        scaler: Any = None,
        step: int = 0,
        max_steps: int | None = None,
        save: Callable[[int], object] | None = None,
    ) -> Iterator[Monitor]:
        """Watches a plain loop: inside, every ``optimizer.step()`` is one step.

        Give the loss with `observe`; call `before_clip` where the loop clips gradients itself.
        Where a policy or a person stops the training, the loop is left at the end of the step,
        what follows the ``with`` goes on, and `stopped` says why.

        Args:
            model: a module, a DDP or FSDP2 module, compiled or not, or a DeepSpeed engine.
            optimizer: the optimizer, or accelerate's wrapper of it; DeepSpeed brings its own.
            step: optimizer steps done before, in a loop that goes on from a checkpoint: the run
                directory is continued behind them.
            scaler: the `torch.amp.GradScaler`, if there is one; its ``step`` is then the step,
                also where it skips the optimizer's for an overflow.
            max_steps: optimizer steps of the whole training, for policies that go by it.
            save: writes a checkpoint of the loop, where a policy or a person asks for one; called
                with the step, on every rank, when the step is done.

        Raises:
            InputError: the engine is not supported, the run directory is taken, or a policy
                cannot act.
        """
        engine = find_engine(model, optimizer, scaler=scaler)
        can = ("stop",) if save is None else ("save", "stop")
        info = {"model": describe_model(model)}
        self.start(engine, step=step, info=info, max_steps=max_steps, can=can)
        self.hook_step(self.stepped, lambda: self._ended(save))
        status: Status = "failed"
        try:
            yield self
            status = "finished"
        except TrainingStoppedError as error:
            status = "stopped"
            if self.stopped is None:  # somebody else's
                raise
            logger.warning("monitor: stopped at step %d: %s", self.step, error)
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            self.close(status)

    def add_source(self, names: Sequence[str], read: Source) -> Undo:
        """Adds metrics of every step from elsewhere, summed over ranks in the step's one vector.

        Args:
            names: of the metrics, ``family/stat/scope``, alike on all ranks.
            read: called once a step before clipping; this rank's values, in that order. Where it
                raises, the metrics of the step are NaN.

        Returns:
            What takes them back, on all ranks between the same two steps.

        Raises:
            InputError: a name is not of that form.
        """
        source = tuple(Metric(name=name).name for name in names), read
        self._sources.append(source)

        def undo() -> None:
            if source in self._sources:
                self._sources.remove(source)

        return undo

    # -- the life of a run -------------------------------------------------------------------

    def start(
        self,
        engine: Engine,
        *,
        step: int = 0,
        info: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        can: Collection[str] = (),
        scheduler: str = "",
    ) -> None:
        """Opens the run; every rank calls it.

        Args:
            engine: the engine view to read.
            step: optimizer steps already done; more than 0 continues the run directory.
            info: further entries for run.json.
            max_steps: optimizer steps of the whole training, where they are known.
            can: of ``save`` and ``stop`` what whoever trains does at `wanted`.
            scheduler: kind of the learning rate's schedule, where it is known.

        Raises:
            InputError: the run directory is taken, policies contradict one another, or a state
                that was given back is damaged.
        """
        self.close("failed")  # of a training that raised in this process before
        self._broken, self.stopped = False, None
        self._rules = RuleSet(self._given_rules)
        self.step = step
        self._steering = Steering(
            engine,
            self._policies,
            mode=self._mode,
            seed=self._seed,
            max_steps=max_steps,
            can=can,
            scheduler=scheduler,
        )
        self._capture, undos = assemble(engine, self._sample_every, self._next_is_sampled)
        self._undos += undos
        self._flops = TrainingFlops.of(engine.model)
        self._undos.append(self._steering.ends)
        self._current = TrainingStep()
        about = {"max_steps": max_steps, **(info or {})}
        self._open("resume" if step else self._if_exists, engine, about)
        about = {"engine": engine.name, "world_size": world_size(), "max_steps": max_steps}
        if self._policies:
            about["policies"] = self._steering.modes
        self.event("start", about)
        self._restore_policies()

    def hook_step(self, after: AfterStep, ended: Callable[[], None] = nothing) -> None:
        """Hooks the engine's step, until the run is closed: reading, acting, `after` and `ended`.

        Args:
            after: see `Engine.hook_step`.
            ended: see there.

        Raises:
            RuntimeError: no run is open.
        """
        if self._capture is None or self._steering is None:
            raise RuntimeError("monitor: hook_step() before start()")
        engine = self._capture.engine
        place = self._steering.gate.place
        self._undos.append(place(lambda: engine.hook_step(self.gradients_ready, after, ended)))

    def _next_is_sampled(self) -> bool:
        return self._capture is not None and self._capture.is_sampled(self.step + 1)

    def _open(self, if_exists: IfExists, engine: Engine, info: dict[str, Any]) -> None:
        """Rank 0 takes the run directory; where it cannot, every rank raises."""
        error: Exception | None = None
        if rank() == 0:
            try:
                self._recording = self._open_recording(if_exists, engine, info)
                self._end = AtTheEnd(self.close)
                if self._steering is not None:
                    self._steering.listen(self.run_dir)
            except OSError as e:
                error = InputError(f"run directory {self.run_dir}: {e.strerror or e}")
            except Exception as e:  # noqa: BLE001 - raised below, where no rank waits for another
                error = e
        elsewhere = InputError("monitor: rank 0 could not take the run directory; see its message")
        agree_or_raise(error, elsewhere, engine.device)

    def _open_recording(
        self, if_exists: IfExists, engine: Engine, info: dict[str, Any]
    ) -> Recording:
        about = {"engine": engine.name, "world_size": world_size(), "config": self._config}
        about["sinks"] = [f"{type(s).__module__}:{type(s).__qualname__}" for s in self._sinks]
        return Recording(
            self.run_dir,
            if_exists,
            {**describe_environment(), **about, **info},
            sinks=self._sinks,
            tensorboard=self._tensorboard,
            mirror=self._mirror,
        )

    def close(self, status: Status = "finished") -> None:
        """Takes every hook back, writes everything out, ends the run; safe to call twice."""
        undo_all(self._undos)
        self._capture = None
        recording, end = self._recording, self._end
        if recording is not None and end is not None:
            with end.closing():
                status = end.judged("stopped" if self.stopped else status)
                why = {"reason": self.stopped} if self.stopped else {}
                self.event("stop", {"status": status, **why})
                self._recording = self._end = None
                recording.close(status)

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
    ) -> None:
        """Adds what this rank saw of the coming step; call it for each micro-batch.

        Args:
            loss: this micro-batch's part of the step's loss; parts are added up over micro-batches
                and averaged over ranks. A scalar tensor is not copied to the host here.
            tokens: tokens this rank trained on and no other rank did.
            loss_tokens: those of them that carry a label.
            attended: pairs of tokens that attention looked at, the sum of squared row lengths;
                counts in `train/mfu/total`.

        Raises:
            InputError: `loss` is a tensor of several elements.
        """
        step = self._current
        if step.parts is not None and not self._warned:
            self._warned = True
            logger.warning(
                "monitor: observe() came after before_clip() of the same step: call before_clip "
                "once a step, after its last micro-batch, or the gradients are read too early"
            )
        step.observe(loss, tokens, loss_tokens, attended)

    def before_clip(self) -> None:
        """Reads the step's gradients now; for loops that clip before ``optimizer.step()``.

        Call it once a step, after the last micro-batch's backward pass. It does nothing where the
        engine clips within its own step (DeepSpeed), which is read there.
        """
        if self._capture is not None and not self._capture.engine.clips_in_step:
            self.gradients_ready()

    def gradients_ready(self) -> None:
        """Reads the step: probes, one all-reduce, one copy. All ranks; once per step."""
        step = self._current
        if self._capture is None or step.parts is not None:
            return
        began = time.perf_counter()
        given = self._read_sources()
        sent = {} if self._steering is None else self._steering.sends()
        captured = self._capture.read(self.step + 1, step.observed() | given | sent)
        step.parts, step.sums = captured.parts, captured.extra
        sources = {name: step.sums[name] for name in given}
        steered = self._steer(step, self._capture, sources)
        if self._recording is not None and not self._broken:
            try:
                if captured.of_previous:
                    self._publish_record(captured.of_previous, self._recording)
                own = step.metrics(self._capture.engine, steered.norm)
                step.parts.append(as_part(own | sources))
                for event in steered.events:
                    self._recording.publish(event)
            except Exception:  # noqa: BLE001 - _give_up logs it
                self._give_up()
        step.overhead += time.perf_counter() - began

    def _steer(self, step: TrainingStep, capture: Capture, sources: Mapping[str, float]) -> Steered:
        """Lets policies and people act; on every rank, with the same numbers."""

        def look() -> StepRecord:
            own = as_part({**step.metrics(capture.engine), **sources})
            return self._record([*(step.parts or ()), own], self.step + 1)

        if self._steering is None:
            return Steered()
        try:
            return self._steering.steer(look, step.sums, capture.names)
        except InputError:  # before the first step, a policy that cannot act
            raise
        except Exception:
            logger.exception("monitor: could not ask the policies; they are off")
            self._steering.turn_off()
            return Steered()

    def _record(self, parts: Sequence[Part], step: int) -> StepRecord:
        return StepRecord(
            step=step,
            time=time.time(),
            schema=self._schema(tuple(schema for schema, _ in parts)),
            values=np.concatenate([values for _, values in parts]),
        )

    def _read_sources(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for names, read in self._sources:
            try:
                values |= zip(names, map(float, read()), strict=True)
            except Exception:
                logger.exception("monitor: %s could not be read", ", ".join(names))
                values |= dict.fromkeys(names, math.nan)
        return values

    def stepped(self, done: bool = True) -> None:
        """Looks at what the optimizer step did, before a scheduler changes its settings.

        Args:
            done: false where the step was skipped for an overflow.
        """
        if self._capture is not None:
            began = time.perf_counter()
            left_out = self._steering is not None and self._steering.stepped()
            self._capture.stepped(done and not left_out)
            self._current.overhead += time.perf_counter() - began

    def _ended(self, save: Callable[[int], object] | None) -> None:
        """The end of a plain loop's step."""
        self.step_ends()
        wanted = self.wanted()
        if "save" in wanted and save is not None:
            save(self.step)
        if "stop" in wanted:
            raise TrainingStoppedError(wanted["stop"])

    def wanted(self) -> dict[str, str]:
        """What whoever trains is to do at the end of this step: ``save``, ``stop``, and why.

        Alike on all ranks; asked once a step.
        """
        if self._steering is None:
            return {}
        wanted, self._steering.wants = self._steering.wants, {}
        self.stopped = wanted.get("stop", self.stopped)
        return wanted

    def step_ends(self, step: int | None = None) -> None:
        """Completes and publishes the step's record.

        Args:
            step: the step's number where the caller counts; otherwise the last one plus 1.
        """
        current, self._current = self._current, TrainingStep()
        self.step = self.step + 1 if step is None else step
        if current.parts is None or self._recording is None or self._broken:
            return
        try:
            self._publish(current, current.parts, self._recording)
        except Exception:  # noqa: BLE001 - _give_up logs it
            self._give_up()
        self._current.began = time.perf_counter()

    def _give_up(self) -> None:
        """Stops recording after a defect: it may cost the records, never the training."""
        self._broken = True
        logger.exception("monitor: could not record step %d; recording is off", self.step)

    def _publish(self, step: TrainingStep, parts: list[Part], recording: Recording) -> None:
        began = time.perf_counter()
        times: dict[str, float] = {}
        if self._capture is not None and self._flops is not None:
            device = self._capture.engine.device
            times = step.times(began - step.began, self._flops, device)
        times["monitor/overhead_seconds/total"] = step.overhead + self._last_publish
        times |= {f"monitor/dropped_records/{n}": float(c) for n, c in recording.dropped().items()}
        self._publish_record([*parts, as_part(times)], recording)
        # Known only now, so it is booked on the next record.
        self._last_publish = time.perf_counter() - began

    def _publish_record(self, parts: list[Part], recording: Recording) -> None:
        """Publishes a record of the current step, and the alerts that rules make of it."""
        record = self._record(parts, self.step)
        recording.publish(record)
        for alert in self._rules.observe(record):
            recording.publish(alert.to_event(record.time))

    def _schema(self, parts: tuple[Schema, ...]) -> Schema:
        if parts not in self._schemas:
            self._schemas[parts] = Schema(tuple(name for part in parts for name in part.names))
        return self._schemas[parts]

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What policies remember, to be kept with a checkpoint of this step; every rank calls it.

        ``torch.load(..., weights_only=True)`` reads it. `attach` and `MonitorCallback` keep it
        with every checkpoint of the Trainer and give it back by themselves.
        """
        if self._steering is None:
            return {}
        self._steering.saved(self.step)
        return {
            "policies": torch.frombuffer(bytearray(self._steering.to_bytes()), dtype=torch.uint8)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Gives `state_dict` back; before the training that resumes begins.

        Raises:
            InputError: it is not what `state_dict` gave.
        """
        held = state.get("policies")
        if held is not None and (not isinstance(held, Tensor) or held.dtype != torch.uint8):
            raise InputError("monitor: load_state_dict() got what state_dict() did not give")
        self._state = None if held is None else held.cpu().numpy().tobytes()

    def _restore_policies(self) -> None:
        """Gives the policies back what they remembered at the checkpoint that is resumed."""
        state, self._state = self._state, None
        anew = [policy.name for policy in self._policies] if self.step else []
        if state is not None and self._steering is not None:
            anew = self._steering.load(state, "monitor: load_state_dict()", self.step)
        if anew:
            logger.warning(
                "monitor: the checkpoint says nothing of %s: begun anew", ", ".join(anew)
            )
            self.event("monitor", {"policies_anew": anew})

    # -- what happens between steps ------------------------------------------------------------

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Publishes an event at the current step; does nothing where no run is open."""
        if self._recording is not None:
            self._recording.publish(Event(kind=kind, step=self.step, time=time.time(), data=data))

    def record(self, metrics: Mapping[str, float]) -> None:
        """Publishes further metrics of the current step, such as an evaluation's; rank 0's count.

        Raises:
            InputError: a name is not of the form ``family/stat/scope``.
        """
        names = tuple(Metric(name=name).name for name in metrics)
        if self._recording is not None and names:
            values = np.array([float(value) for value in metrics.values()], np.float64)
            record = StepRecord(self.step, time.time(), schema_of(names), values)
            self._recording.publish(record)


def _check_settings(
    run_dir: str | Path, sample_every: int, if_exists: str, mirror: str | None
) -> None:
    if not str(run_dir) or "://" in str(run_dir):
        raise InputError(
            f"monitor: run_dir is {str(run_dir)!r}; allowed is a local directory, such as "
            "runs/demo; mirror= copies it to a URL"
        )
    if not isinstance(sample_every, int) or sample_every < 1:
        raise InputError(f"monitor: sample_every is {sample_every!r}; allowed is 1, 2, 3, ...")
    if if_exists not in get_args(IfExists):
        allowed = ", ".join(get_args(IfExists))
        raise InputError(f"monitor: if_exists is {if_exists!r}; allowed is one of {allowed}")
    if mirror is not None:
        check_mirror(mirror)


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class and parameter counts, for run.json."""
    model = getattr(model, "module", model)
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(map(numel, parameters)),
        "trainable_parameters": sum(numel(p) for p in parameters if p.requires_grad),
    }

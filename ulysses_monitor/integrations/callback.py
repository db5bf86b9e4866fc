"""`MonitorCallback`: watches any Hugging Face or TRL Trainer, before gradients are clipped.

A callback alone comes too late: transformers calls ``on_pre_optimizer_step`` after clipping, and
under DeepSpeed the whole step happens inside ``accelerator.backward``. So for the duration of one
training, the callback patches instances that the Trainer owns:

- ``trainer.get_batch_samples``: the step's micro-batches and their number of label tokens; and
  ``trainer._prepare_inputs`` if those are prompts, from which it makes the batches (GRPO, RLOO);
- the parts of the Trainer's loop, ``training_step`` among them: the exception that ends a training;
- ``accelerator.backward``: each micro-batch's loss, as it is scaled for accumulation;
- ``accelerator.clip_grad_norm_``, which the Trainer calls once a step on every path but
  DeepSpeed's: gradients are reduced and not yet clipped;
- the engine's step: under DeepSpeed it is the moment to read, elsewhere it tells when the step
  is done.

All patches are removed when training ends.

Nothing here imports ``transformers.trainer``: under `ulysses attach`, importing it imports this
module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers.trainer_callback import TrainerCallback

from ulysses_monitor.common.files import replace_file
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.engines import Engine
from ulysses_monitor.integrations.evaluation import RandomDraws, draws_on_purpose
from ulysses_monitor.integrations.hooks import check_hooks
from ulysses_monitor.integrations.patches import (
    BatchPatch,
    end_when_it_fails,
    observe_loss,
    read_before_clipping,
)
from ulysses_monitor.integrations.rewards import describe_rewards
from ulysses_monitor.integrations.schedule import loss_before, watch_schedule
from ulysses_monitor.integrations.trainer_description import describe_training
from ulysses_monitor.integrations.trainer_lookup import (
    calling_trainer,
    engine_of,
    find_obstacle,
    read_on_rank_0,
    resumed_checkpoint,
)
from ulysses_monitor.records.trainer_names import name_numbers
from ulysses_monitor.session.model_facts import special_tokens
from ulysses_monitor.session.opening import Training
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.session import Session

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["MonitorCallback", "OpensSessions", "TrainerWatcher"]


class OpensSessions(Protocol):
    """What a `MonitorCallback` needs of a monitor."""

    def open(self, engine: Engine, training: Training) -> Session:
        """Opens the run of a training that begins."""

    def close(self, status: Status = "finished") -> None:
        """Ends the open run."""


class TrainerWatcher(TrainerCallback):
    """Connects the trainings of a Trainer to sessions, one for each.

    Args:
        trainer: the Trainer; without it, the Trainer is looked for when a training begins.

    Attributes:
        session: the session of the training that is going on, None between trainings.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.session: Session | None = None
        self._given = trainer
        self._trainer: Trainer | None = trainer
        self._undos: list[Undo] = []
        self._logged: frozenset[str] = frozenset()
        self._draws = RandomDraws()
        self._resumed: dict[str, float] = {}

    def open_session(self, trainer: Trainer, engine: Engine, training: Training) -> Session:
        """Opens the session of a training that begins.

        Raises:
            InputError: it cannot be opened.
        """
        raise NotImplementedError

    # -- events of the Trainer -----------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the Trainer and its engine, opens the run, patches what it must see."""
        undo_all(self._undos)  # of a training that raised before
        trainer = self._find_trainer(state)
        check_hooks(trainer)
        engine = engine_of(trainer)
        self.session = session = self.open_session(
            trainer, engine, self._describe(trainer, state, engine)
        )
        accelerator = trainer.accelerator
        batches = BatchPatch(trainer, session)
        self._undos = [
            batches.undo,
            *watch_schedule(trainer, session),
            session.rows.hook(trainer.model_wrapped),
            *end_when_it_fails(trainer, self._fail),
            patch_method(accelerator, "backward", observe_loss(session)),
        ]
        if not engine.clips_in_step:
            self._undos.append(
                patch_method(accelerator, "clip_grad_norm_", read_before_clipping(session))
            )
        self._resumed = loss_before(state)
        # If the step was read before it was clipped, this does not read it again.
        session.hook_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Completes the step's record; does what policies or people ask of the training."""
        self._draws.take()  # of a prediction

        def end_step(session: Session) -> None:
            session.step_ends(state.global_step)
            resumed, self._resumed = self._resumed, {}
            if rank() == 0 and resumed:
                session.guarded("the loss before a resume", lambda: session.log(resumed), None)
            requests = session.take_requests()
            if "save" in requests:
                control.should_save = True
            if "stop" in requests:
                control.should_training_stop = True

        self._guarded("on_step_end", end_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether the evaluation's forward passes draw random numbers."""
        trainer = self._trainer
        if trainer is not None and not draws_on_purpose(trainer):
            self._guarded("on_prediction_step", lambda _: self._draws.see(args.device))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records an evaluation's numbers as ``eval/<name>/total``, once each."""
        logged, self._logged = self._logged, frozenset()
        drawn = self._draws.take()

        def record(session: Session) -> None:
            numbers = name_numbers(metrics or {}, is_evaluation=True)
            session.log({name: n for name, n in numbers.items() if name not in logged} | drawn)

        if rank() == 0:
            self._guarded("on_evaluate", record)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records what the Trainer logs and the monitor does not measure; see `name_numbers`.

        Some of TRL's Trainers log more of an evaluation than they pass to `on_evaluate`.
        """

        def record(session: Session) -> None:
            numbers = name_numbers(logs or {})
            self._logged = frozenset(numbers)
            session.log(numbers)
            look = partial(describe_rewards, self._trainer, logs or {})
            session.log(session.guarded("looking at the rewards", look, {}))

        if rank() == 0:
            self._guarded("on_log", record)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records that a checkpoint was written, and keeps with it what policies remember."""
        trainer = self._trainer
        if trainer is not None:
            self._guarded("on_save", lambda session: self._keep_policies(session, trainer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the run and removes every patch."""
        self.finish("finished")

    def finish(self, status: Status) -> None:
        """Ends the run with `status`; for callers that see the training fail."""
        session = self.session
        if session is None:
            return
        while self._undos:  # also those after one that raises
            session.guarded("removing the patches", lambda: undo_all(self._undos), None)
        session.guarded("ending the run", lambda: session.close(status), None)
        self.session = None

    def _fail(self, error: BaseException) -> None:
        """Ends the run of a training that raises `error`."""
        if self.session is not None:
            self.session.failure.note(error)
        self.finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")

    def _guarded(self, part: str, function: Callable[[Session], None]) -> None:
        """Calls `function` with the session of the training, which it cannot harm."""
        session = self.session
        if session is not None:
            session.guarded(part, lambda: function(session), None)

    def _keep_policies(self, session: Session, trainer: Trainer) -> None:
        step = trainer.state.global_step
        session.event("checkpoint", {"path": f"checkpoint-{step}"})
        held = session.policy_state()
        folder = Path(trainer._get_output_dir(trial=None), f"checkpoint-{step}")
        if rank() == 0 and held is not None and folder.is_dir():
            with replace_file(folder / self._state_file(trainer)) as file:
                file.write(held)

    def _find_trainer(self, state: TrainerState) -> Trainer:
        """Returns the Trainer that trains: the given one, or the one on the stack.

        A callback that was attached to one Trainer may have been handed to another one.
        """
        given = self._given
        trainer = given if given is not None and given.state is state else calling_trainer(self)
        self._trainer = trainer
        return trainer

    def _describe(self, trainer: Trainer, state: TrainerState, engine: Engine) -> Training:
        kind = trainer.args.lr_scheduler_type
        checkpoint = None
        if state.global_step:
            place = resumed_checkpoint(trainer) / self._state_file(trainer)
            checkpoint = read_on_rank_0(place, engine)
        return Training(
            step=state.global_step,
            max_steps=state.max_steps if state.max_steps > 0 else None,
            info=describe_training(trainer),
            abilities=("save", "stop"),
            scheduler=str(getattr(kind, "value", kind)),
            policy_state=checkpoint,
            no_rerun=find_obstacle(trainer),
            special_tokens=special_tokens(getattr(trainer, "processing_class", None)) or (),
        )

    def _state_file(self, trainer: Trainer) -> str:
        """Returns the name of the policies' file in a checkpoint; each monitor has its own."""
        watchers = [c for c in trainer.callback_handler.callbacks if isinstance(c, TrainerWatcher)]
        return f"ulysses_policies_{watchers.index(self)}.npz"


class MonitorCallback(TrainerWatcher):
    """Connects a monitor to the Trainer it is added to.

    Args:
        monitor: its run starts with the training and ends with it.
        trainer: the Trainer, if it is at hand.
    """

    def __init__(self, monitor: OpensSessions, trainer: Trainer | None = None) -> None:
        super().__init__(trainer)
        self.monitor = monitor

    def open_session(self, trainer: Trainer, engine: Engine, training: Training) -> Session:
        """Opens the monitor's next session."""
        return self.monitor.open(engine, training)

    def finish(self, status: Status) -> None:
        """Ends the run with `status`, and the monitor lets go of the Trainer."""
        session = self.session
        super().finish(status)
        if session is not None:
            session.guarded("ending the run", lambda: self.monitor.close(status), None)

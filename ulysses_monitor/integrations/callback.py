"""`MonitorCallback`: watches any Hugging Face or TRL Trainer, before gradients are clipped.

A callback alone comes too late: transformers calls ``on_pre_optimizer_step`` after clipping, and
under DeepSpeed the whole step happens inside ``accelerator.backward``. So the callback places, for
the time of one training, patches on instances that the Trainer owns:

- ``trainer.get_batch_samples``: the step's micro-batches and their number of label tokens; and
  ``trainer._prepare_inputs`` where those are prompts, of which it makes the batches (GRPO, RLOO);
- ``accelerator.backward``: each micro-batch's loss, as it is scaled for accumulation;
- ``accelerator.clip_grad_norm_``, which the Trainer calls once a step on every path but
  DeepSpeed's: gradients are reduced and not yet clipped;
- the engine's step: under DeepSpeed it is the moment to read, elsewhere it tells when the step
  is done.

All are taken back when training ends.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.files import write_whole
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.common.ranks import broadcast_bytes, rank
from ulysses_monitor.engines import Engine, find_engine
from ulysses_monitor.integrations.batches import attended_pairs, label_tokens, row_tokens
from ulysses_monitor.monitor import Monitor, describe_model
from ulysses_monitor.records.trainer_names import evaluation_name

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["MonitorCallback", "attach", "calling_trainer"]

logger = logging.getLogger(__name__)


def attach(monitor: Monitor, trainer: Any) -> MonitorCallback:
    """Adds a `MonitorCallback` for `monitor` to `trainer`.

    Raises:
        InputError: `trainer` is not a `transformers.Trainer`.
    """
    if not isinstance(trainer, Trainer):
        raise InputError(
            f"monitor: attach() got a {type(trainer).__name__}; allowed is a transformers.Trainer "
            "or a subclass of it, and watch(model, optimizer) for a plain loop"
        )
    callback = MonitorCallback(monitor)
    trainer.add_callback(callback)
    return callback


class MonitorCallback(TrainerCallback):
    """Connects a `Monitor` to the Trainer it is added to.

    Args:
        monitor: the monitor; its run starts with the training and ends with it.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._undos: list[Undo] = []
        self._place = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the Trainer and its engine, opens the run, places the patches."""
        undo_all(self._undos)  # of a training that raised before
        trainer = calling_trainer(self)
        monitor = self.monitor
        engine = _engine(trainer)
        self._place = _state_file(trainer, self)
        if state.global_step:
            _give_back(monitor, self._place, _resumed_from(trainer), engine)
        monitor.start(
            engine,
            step=state.global_step,
            info=_describe(trainer, state),
            max_steps=state.max_steps if state.max_steps > 0 else None,
            can=("save", "stop"),
            scheduler=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        )
        accelerator = trainer.accelerator
        self._undos = [
            patch_method(trainer, "get_batch_samples", self._get_batch_samples(trainer)),
            patch_method(accelerator, "backward", self._backward),
        ]
        if not engine.clips_in_step:
            self._undos.append(patch_method(accelerator, "clip_grad_norm_", self._clip))
        # Where the step was read before it was clipped, this does not read it again.
        monitor.hook_step(monitor.stepped)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Completes the step's record; does what policies or people ask of the training."""
        self.monitor.step_ends(state.global_step)
        wanted = self.monitor.wanted()
        if "save" in wanted:
            control.should_save = True
        if "stop" in wanted:
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records an evaluation's numbers as ``eval/<name>/total``."""
        numbers = {
            evaluation_name(name): float(value)
            for name, value in (metrics or {}).items()
            if isinstance(value, int | float) and name != "epoch"
        }
        self.monitor.record(numbers)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records that a checkpoint was written, and keeps with it what policies remember."""
        self.monitor.event("checkpoint", {"path": f"checkpoint-{state.global_step}"})
        try:
            held = self.monitor.state_dict().get("policies")
        except Exception:
            logger.exception("monitor: the policies' memory is not kept with this checkpoint")
            return
        folder = Path(calling_trainer(self)._get_output_dir(trial=None))
        folder /= f"checkpoint-{state.global_step}"
        if rank() == 0 and held is not None and folder.is_dir():
            try:
                write_whole(folder / self._place, held.numpy().tobytes())
            except OSError as error:
                logger.error("monitor: %s: not written: %s", folder / self._place, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the run and takes every patch back."""
        self.finish("finished")

    def finish(self, status: Any) -> None:
        """Ends the run with `status`; for callers that see the training fail."""
        undo_all(self._undos)
        self.monitor.close(status)

    # -- the patches ---------------------------------------------------------------------------

    def _get_batch_samples(self, trainer: Trainer) -> Callable[..., Any]:
        made_late = False

        def count(batch: Any) -> None:
            # Ranks that share rows share their tokens. `get_sp_size` is not among them: DeepSpeed's
            # own sequence parallelism has cut the rows before they come here.
            peers = trainer.get_cp_size() * trainer.get_tp_size()
            labels = label_tokens(batch, getattr(trainer, "_loss_shifts_labels", True))
            self.monitor.observe(
                tokens=row_tokens(batch) / peers,
                loss_tokens=None if labels is None else labels / peers,
                attended=attended_pairs(batch) / peers,
            )

        def prepare_inputs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            batch = original(*args, **kwargs)
            if trainer.model.training:  # not an evaluation between steps
                count(batch)
            return batch

        def get_batch_samples(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal made_late
            self.monitor.step_begins()
            batches, count_of_labels = original(*args, **kwargs)
            for batch in batches:
                if isinstance(batch, Mapping):
                    count(batch)
                elif not made_late:  # prompts: GRPO and its kin make batches of them just in time
                    made_late = True
                    self._undos.append(patch_method(trainer, "_prepare_inputs", prepare_inputs))
            return batches, count_of_labels

        return get_batch_samples

    def _backward(
        self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self.monitor.observe(loss=loss)
        return original(loss, *args, **kwargs)

    def _clip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.monitor.gradients_ready()
        return original(*args, **kwargs)


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that is calling `callback`, found on the stack: transformers does not pass it.

    Raises:
        InputError: no caller is a Trainer that has this callback.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise InputError("monitor: MonitorCallback was called by something that is not a Trainer")


def _state_file(trainer: Trainer, callback: MonitorCallback) -> str:
    """What in a checkpoint holds the policies' memory; several monitors have a file each."""
    callbacks = trainer.callback_handler.callbacks
    own = [c for c in callbacks if isinstance(c, MonitorCallback)].index(callback)
    return f"ulysses_policies_{own}.npz"


def _resumed_from(trainer: Trainer) -> Path:
    """The checkpoint that the Trainer resumes from; it tells its own methods alone."""
    frame = sys._getframe(1)
    while frame is not None:
        given = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(given, str | os.PathLike):
            return Path(given)
        frame = frame.f_back  # type: ignore[assignment]
    step = trainer.state.global_step
    return Path(trainer._get_output_dir(trial=None)) / f"checkpoint-{step}"


def _give_back(monitor: Monitor, place: str, checkpoint: Path, engine: Engine) -> None:
    """Reads on rank 0, whose file system has the checkpoint, what `on_save` wrote."""
    held = b""
    if rank() == 0:
        try:
            held = (checkpoint / place).read_bytes()
        except OSError as error:
            logger.debug("monitor: %s: %s", checkpoint / place, error)
    held = broadcast_bytes(held, engine.device)
    if held:
        monitor.load_state_dict({"policies": torch.frombuffer(bytearray(held), dtype=torch.uint8)})


def _engine(trainer: Trainer) -> Engine:
    return find_engine(
        trainer.model_wrapped,
        trainer.optimizer,
        scaler=trainer.accelerator.scaler,
        clip_norm=lambda: trainer.args.max_grad_norm or None,
    )


def _describe(trainer: Trainer, state: TrainerState) -> dict[str, Any]:
    return {
        "trainer": type(trainer).__name__,
        "model": describe_model(trainer.model),
        "resumed_at_step": state.global_step or None,
    }

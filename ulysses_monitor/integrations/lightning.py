"""`LightningCallback`: watches a fit of Lightning's Trainer, before gradients are clipped.

Lightning passes a closure to ``optimizer.step``, and clips inside it. So the step is read in
``on_before_optimizer_step``, which comes between the backward pass and clipping: gradients are
accumulated, reduced and unscaled. With manual optimization, the module clips before that, as a
plain loop does; for the duration of a fit, ``precision_plugin.clip_gradients`` is patched on the
instance.

Lightning is imported when a `LightningCallback` is made.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.extras import is_installed
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.engines import Engine
from ulysses_monitor.integrations.batches import attended_pairs, label_tokens, row_tokens
from ulysses_monitor.integrations.lightning_trainer import (
    describe_training,
    engine_of,
    name_metrics,
    shifts_labels,
)
from ulysses_monitor.session.opening import Training
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.session import Session

__all__ = ["LightningCallback"]

_NAMESPACES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
"""The two names of Lightning's module, and the packages that they belong to."""


class _Monitor(Protocol):
    """What a `LightningCallback` needs of a monitor."""

    def open(self, engine: Engine, training: Training) -> Session: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class LightningCallback:
    """Connects a monitor to the Lightning Trainer whose callbacks it is among.

    ``Trainer(callbacks=[um.LightningCallback(monitor)])``: each fit is a run, which starts and ends
    with it. Fits on one device and under DDP are watched, with automatic optimization, or manual
    optimization with one optimizer.

    What the module logs is recorded: ``train/<name>/total`` every `log_every_n_steps` steps, and
    ``eval/<name>/total`` at the end of each validation.

    Args:
        monitor: records the fits.

    Raises:
        InputError: Lightning is not installed.
    """

    def __new__(cls, *_: Any) -> LightningCallback:
        """Makes it a `Callback` of Lightning's, which this class cannot be without Lightning."""
        return object.__new__(_bind(cls, _callback_bases()))

    def __init__(self, monitor: _Monitor) -> None:
        self.monitor = monitor
        self._session: Session | None = None
        self._undos: list[Undo] = []
        self._requests: dict[str, str] = {}
        self._is_shifted = self._has_begun = False
        self._before_evaluation: dict[str, Any] = {}

    def __reduce__(self) -> Any:
        """Lets Lightning hand it to the processes that it spawns."""
        return type(self).__mro__[1], (self.monitor,)

    # -- the life of a fit ---------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the run and hooks the step."""
        self._finish("failed")  # a fit that ended without telling
        engine = engine_of(trainer, pl_module)
        # Restored policies are in the monitor by now, which hands them to the session itself.
        session = self.monitor.open(engine, describe_training(trainer, pl_module))
        self._session, self._has_begun, self._requests = session, False, {}
        self._is_shifted = shifts_labels(pl_module)
        self._undos = [
            patch_method(trainer.precision_plugin, "clip_gradients", _read_first(session)),
            patch_method(trainer, "save_checkpoint", _note_checkpoint(session)),
        ]
        by_hand = not pl_module.automatic_optimization
        session.hook_step(lambda: self._end_step(session, trainer), sees_clipping=by_hand)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the run; not before, because the last checkpoint is saved as training ends."""
        self._finish("finished")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the run of a fit that raised, and keeps why."""
        if self._session is not None:
            self._session.failure.note(exception)
        is_wanted = isinstance(exception, KeyboardInterrupt | TrainingStoppedError)
        self._finish("stopped" if is_wanted else "failed")

    def _finish(self, status: Status) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        while self._undos:  # also those after one that raises
            session.guarded("removing the patches", lambda: undo_all(self._undos), None)
        session.guarded("ending the run", lambda: session.close(status), None)

    # -- one step ------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a micro-batch's tokens."""
        self._has_begun = True
        if self._session is not None:
            count = _count(self._session, batch, self._is_shifted)
            if not self._session.guarded("counting tokens", count, False):
                self._session.miss(counts=True)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Observes a micro-batch's loss, as it is scaled for accumulation."""
        if self._session is not None:
            observe = _observe(self._session, loss, trainer.precision_plugin)
            if not self._session.guarded("observing the loss", observe, False):
                self._session.miss(loss=True)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Reads the step: gradients are accumulated, reduced and unscaled, and not yet clipped."""
        if self._session is not None:
            self._session.gradients_ready()

    def _end_step(self, session: Session, trainer: Any) -> None:
        # Lightning counts the step only after the optimizer's; never if it does not see the step.
        session.step_ends(max(session.step, trainer.global_step) + 1)
        self._requests |= session.take_requests()
        self._has_begun = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records what the module logged; does what policies or people ask of the training."""
        is_step_over = not self._has_begun
        if is_step_over and trainer.global_step % trainer.log_every_n_steps == 0:
            self._record("on_train_batch_end", trainer.callback_metrics, is_evaluation=False)
        requests, self._requests = self._requests, {}
        if "save" in requests:
            trainer.save_checkpoint(_choose_file(trainer))
        if "stop" in requests:
            trainer.should_stop = True

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remembers what was logged before."""
        self._before_evaluation = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Records the evaluation's numbers, and starts the next step's clock."""
        before, self._before_evaluation = self._before_evaluation, {}
        metrics = trainer.callback_metrics  # of the whole fit; those of this evaluation are new
        new = {name: value for name, value in metrics.items() if before.get(name) is not value}
        self._record("on_validation_end", new, is_evaluation=True)
        if self._session is not None and not self._has_begun:
            self._session.step_begins()

    def _record(self, part: str, metrics: Mapping[str, Any], *, is_evaluation: bool) -> None:
        session = self._session
        if session is not None and rank() == 0:

            def record() -> None:
                session.log(name_metrics(metrics, is_evaluation=is_evaluation))

            session.guarded(part, record, None)

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what policies remember; Lightning keeps it with the checkpoint."""
        session = self._session
        return {} if session is None else session.guarded("on_save", self.monitor.state_dict, {})

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned, for the fit that resumes."""
        self.monitor.load_state_dict(state_dict)


def _callback_bases() -> tuple[type, ...]:
    """Returns the `Callback` of each namespace in use, because each Trainer accepts only its own.

    Raises:
        InputError: Lightning is not installed.
    """
    used = [name for name in _NAMESPACES if name in sys.modules]
    found = used or [name for name, package in _NAMESPACES.items() if is_installed(package)][:1]
    if not found:
        raise InputError(
            "monitor: LightningCallback needs Lightning, which is not installed; run "
            "pip install 'lightning>=2.6'"
        )
    return tuple(importlib.import_module(name).Callback for name in found)


def _bind(kind: type, bases: tuple[type, ...]) -> type:
    """Returns a class of that name that is both; state in checkpoints goes by the name."""
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind, *bases), about)


def _count(session: Session, batch: Any, is_shifted: bool) -> Callable[[], bool]:
    def count() -> bool:
        session.observe(
            tokens=row_tokens(batch),
            loss_tokens=label_tokens(batch, is_shifted),
            attended=attended_pairs(batch),
        )
        session.inputs.see_batch(batch, shifted=is_shifted)
        return True

    return count


def _observe(session: Session, loss: Tensor, precision: Any) -> Callable[[], bool]:
    def observe() -> bool:
        scaler = getattr(precision, "scaler", None)
        # A tensor on the device: GradScaler's own get_scale() would make the host wait for it.
        scale = None if scaler is None else scaler._get_scale_async()
        session.observe(loss=loss.detach() if scale is None else loss.detach() / scale)
        return True

    return observe


def _read_first(session: Session) -> Callable[..., Any]:
    """Returns a wrapper of ``precision_plugin.clip_gradients`` that reads the gradients first."""

    def clip_gradients(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session.gradients_ready()
        return original(*args, **kwargs)

    return clip_gradients


def _note_checkpoint(session: Session) -> Callable[..., Any]:
    """Returns a wrapper of ``trainer.save_checkpoint`` that records where it was written."""

    def save_checkpoint(
        original: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(filepath, *args, **kwargs)
        about = {"path": Path(filepath).name}
        session.guarded("on_save", lambda: session.event("checkpoint", about), None)
        return result

    return save_checkpoint


def _choose_file(trainer: Any) -> Path:
    """Returns where a checkpoint goes that a policy or a person asked for."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(folder, f"step={trainer.global_step}.ckpt")

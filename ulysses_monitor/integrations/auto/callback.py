"""The callback of `ulysses attach`: on every Trainer, decides at the start of each training.

It reaches the Trainers through ``CallbackHandler.call_event``, by which every Trainer tells its
callbacks what happens. When a Trainer has been made, when a training begins and while it is
watched, the callback is put among the others if it is not there. So a framework may replace the
callbacks or their handler, and a subclass may do what it likes in its constructor. Only when a
training begins, when everything is in place, does the callback look whether the Trainer has a
monitor of its own.

Watching must never cost a training: a problem here is reported once, and training continues.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from transformers import Trainer

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.engines import Engine
from ulysses_monitor.integrations.auto import (
    AttachSettings,
    Note,
    TrainerFate,
    choose_place,
    write_note,
)
from ulysses_monitor.integrations.auto.agreement import NotAttachedError, agree
from ulysses_monitor.integrations.auto.places import origin
from ulysses_monitor.integrations.callback import TrainerWatcher
from ulysses_monitor.integrations.hooks import check_handler
from ulysses_monitor.integrations.reporting.names import NAME, name_callback
from ulysses_monitor.integrations.trainer_lookup import calling_trainer
from ulysses_monitor.session.open_sessions import start_session
from ulysses_monitor.session.opening import Training
from ulysses_monitor.session.places import Place
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.session import Session

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["AttachedCallback", "install"]

_WATCHING: WeakKeyDictionary[Any, AttachedCallback] = WeakKeyDictionary()
"""The callback of each handler whose training is watched; it comes back if it is taken out."""


def install(module: ModuleType) -> Undo:
    """Gives an `AttachedCallback` to every Trainer that is made or trains from now on.

    So ``report_to="ulysses"`` asks for what happens anyway; it becomes a known name.

    Args:
        module: ``transformers.trainer``, just imported.

    Returns:
        A function that undoes it for Trainers to come.

    Raises:
        InputError: the settings are wrong, or `module` has no handler of callbacks.
    """
    check_handler(module)
    AttachedCallback.settings = AttachSettings.from_environment(os.environ)
    undos = [patch_method(module.CallbackHandler, "call_event", _call_event)]
    utils = sys.modules.get("transformers.integrations.integration_utils")
    if utils is not None and NAME not in getattr(utils, "INTEGRATION_TO_CALLBACK", {NAME: None}):
        undos.append(name_callback(utils, AttachedCallback))  # unless the script did it
    return lambda: undo_all(undos)


def _call_event(
    original: Callable[..., Any], handler: Any, event: str, *args: Any, **kwargs: Any
) -> Any:
    try:
        _join(handler, event)
    except Exception as error:  # noqa: BLE001 - a handler of the framework's own
        AttachedCallback().report("training continues without the monitor", error)
    return original(handler, event, *args, **kwargs)


def _join(handler: Any, event: str) -> None:
    """Puts an `AttachedCallback` among the handler's callbacks if there should be one."""
    if any(isinstance(callback, AttachedCallback) for callback in handler.callbacks):
        return
    own = _WATCHING.get(handler)
    if own is not None or event in ("on_init_end", "on_train_begin"):
        handler.callbacks.append(own or AttachedCallback())


class AttachedCallback(TrainerWatcher):
    """Opens a session for each training, unless the Trainer has a monitor of its own."""

    settings: ClassVar[AttachSettings]
    """Of this process."""
    _trainings: ClassVar[Iterator[int]] = itertools.count(1)
    """Counts the trainings of this process, the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self._has_reported = False
        self._note("made")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens a session for this training, or reports why not."""
        self._has_reported = False
        training = next(self._trainings)
        try:
            self.finish("failed")  # a training of this Trainer that raised before
            if agree(f"ulysses-attach/{training}", self._vote()) == "own":
                self._note("own")
                return
            super().on_train_begin(args, state, control, **kwargs)
        except Exception as error:  # noqa: BLE001 - training continues without the monitor
            self.report("training continues without the monitor", error)
            with suppress(Exception):
                self.finish("failed")
            return
        if rank() == 0 and self.session is not None:
            self._note("recorded", str(self.session.run_dir))
        else:
            self._note("elsewhere")

    def _vote(self) -> str:
        """Returns ``own`` if another callback watches this training, else ``watch``."""
        callbacks = calling_trainer(self).callback_handler.callbacks
        watching = [c for c in callbacks if isinstance(c, TrainerWatcher)]
        # Of several of this kind (callbacks handed on from Trainer to Trainer) the first watches.
        others = [c for c in watching if not isinstance(c, AttachedCallback)]
        return "own" if others or watching[0] is not self else "watch"

    def open_session(self, trainer: Trainer, engine: Engine, training: Training) -> Session:
        """Opens a session in the run directory that is this training's turn."""
        settings = self.settings
        place, config = Place(settings.run_dir, settings.monitor.if_exists), {}
        if rank() == 0:
            output_dir = str(trainer.args.output_dir)
            place = choose_place(settings, output_dir, training.step)
            config = {"attach": origin(settings, output_dir)}
        parts = settings.monitor.make_parts()
        session = start_session(place, settings.monitor, parts, engine, training, config)
        session.failure.log.follow(sys.stderr)
        _WATCHING[trainer.callback_handler] = self
        return session

    def finish(self, status: Status) -> None:
        """Ends the run with `status`, and lets go of the Trainer."""
        super().finish(status)
        for handler in [known for known, own in _WATCHING.items() if own is self]:
            del _WATCHING[handler]

    def _note(self, outcome: TrainerFate, text: str = "") -> None:
        write_note(self.settings.notes, Note(outcome, text))

    def report(self, what: str, error: Exception) -> None:
        """Reports once for each training what the monitor could not do."""
        if self._has_reported:
            return
        self._has_reported = True
        is_known = isinstance(error, InputError)
        reason = " ".join((str(error) if is_known else f"{type(error).__name__}: {error}").split())
        if rank() == 0 or isinstance(error, NotAttachedError):
            self._note("failed", reason)
        if rank() == 0:
            # Not logged: the user's own script decides where logging goes, if anywhere.
            sys.stderr.write(f"ulysses: {what}: {reason}\n")

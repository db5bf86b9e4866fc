"""The callback of `ulysses attach`: on every Trainer, decides at the start of each training.

It reaches the Trainers through ``transformers.trainer.DEFAULT_CALLBACKS``, the list of classes from
which a Trainer makes its callbacks. Some frameworks replace that list (ms-swift) or build a handler
without it, so a `CallbackHandler` that was built without the callback gets it too. No Trainer is
patched, a subclass may do what it likes in its constructor, and only at ``on_train_begin``, when
everything is in place, does the callback look whether the Trainer has a monitor of its own.

Watching must never cost a training: a problem here is reported once, and training continues.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import Trainer, TrainerCallback

from ulysses_monitor.common.errors import InputError, TrainingStoppedError
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
from ulysses_monitor.integrations.hooks import check_default_callbacks
from ulysses_monitor.integrations.trainer_lookup import calling_trainer
from ulysses_monitor.session.opening import Place, Training
from ulysses_monitor.session.session import Session

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["AttachedCallback", "install"]


def install(module: ModuleType) -> None:
    """Gives an `AttachedCallback` to every Trainer that is made from now on.

    Args:
        module: ``transformers.trainer``, just imported.

    Raises:
        InputError: the settings are wrong, or `module` has no list of default callbacks.
    """
    check_default_callbacks(module)
    AttachedCallback.settings = AttachSettings.from_environment(os.environ)
    module.DEFAULT_CALLBACKS.append(AttachedCallback)
    _join_every_handler(module.CallbackHandler)


def _join_every_handler(handler: Any) -> None:
    """Makes each new `CallbackHandler` have an `AttachedCallback`, whoever builds it."""
    construct = handler.__init__

    @functools.wraps(construct)
    def construct_and_join(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if not any(isinstance(callback, AttachedCallback) for callback in self.callbacks):
            self.callbacks.append(AttachedCallback())

    handler.__init__ = construct_and_join


class AttachedCallback(TrainerWatcher):
    """Opens a session for each training, unless the Trainer has a monitor of its own.

    transformers makes it, without arguments.
    """

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
            self._report("training continues without the monitor", error)
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
        return Session(place, settings.monitor, parts, engine, training, config)

    def _note(self, outcome: TrainerFate, text: str = "") -> None:
        write_note(self.settings.notes, Note(outcome, text))

    def _report(self, what: str, error: Exception) -> None:
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


def _guarded(name: str) -> Callable[..., Any]:
    """Returns the event `name` of a `TrainerWatcher`, which cannot raise into the training."""
    event = getattr(TrainerWatcher, name)

    @functools.wraps(event)
    def call(self: AttachedCallback, *args: Any, **kwargs: Any) -> Any:
        if self.session is None:
            return None
        try:
            return event(self, *args, **kwargs)
        except TrainingStoppedError:  # on purpose: a rule or a policy asked for it
            raise
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            self._report(f"the monitor failed in {name}; training continues", error)
            return None

    return call


# All events, so that none which TrainerWatcher learns later is forgotten here.
for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    if _event not in vars(AttachedCallback):
        setattr(AttachedCallback, _event, _guarded(_event))

"""The callback of `ulysses attach`: on every Trainer, decides at the start of each training.

It comes to the Trainers through ``transformers.trainer.DEFAULT_CALLBACKS``, the list of classes
that every Trainer makes its callbacks from. So no class is patched, a subclass may do in its
constructor what it likes, and it is only at ``on_train_begin``, where everything is in place, that
the callback looks whether the Trainer has a monitor of its own.

Watching must never cost a training: what goes wrong here is said once, and the training goes on.
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

import transformers
from transformers import TrainerCallback

from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.integrations.auto import Note, Outcome, Settings, choose_place, write_note
from ulysses_monitor.integrations.auto.agreement import NotAttachedError, agree
from ulysses_monitor.integrations.auto.places import origin
from ulysses_monitor.integrations.callback import MonitorCallback, calling_trainer
from ulysses_monitor.monitor import Monitor

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["AttachedCallback", "install"]

_OLDEST = (5, 23)
"""The first transformers whose Trainer `MonitorCallback` knows."""


def install(module: ModuleType) -> None:
    """Gives an `AttachedCallback` to every Trainer that is made from now on.

    Args:
        module: ``transformers.trainer``, just imported.

    Raises:
        InputError: the settings are wrong, or the version of transformers is not known.
    """
    version = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise InputError(f"transformers {version} is too old; allowed is {needed} or newer")
    if not isinstance(getattr(module, "DEFAULT_CALLBACKS", None), list):
        raise InputError(f"transformers {version} has no list of default callbacks")
    AttachedCallback.settings = Settings.from_environment(os.environ)
    module.DEFAULT_CALLBACKS.append(AttachedCallback)


class AttachedCallback(MonitorCallback):
    """A `MonitorCallback` that makes a monitor for each training, if the Trainer has none.

    transformers makes it, without arguments.
    """

    settings: ClassVar[Settings]
    """Of this process."""
    _trainings: ClassVar[Iterator[int]] = itertools.count(1)
    """Counts the trainings of this process, alike on all ranks."""

    def __init__(self) -> None:
        super().__init__(self._monitor())
        self._watches = False
        self._spoke = False
        self._note("made")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts a run of its own for this training, or says why not."""
        self._watches = self._spoke = False
        training = next(self._trainings)
        try:
            self.finish("failed")  # a training of this Trainer that raised before
            if agree(f"ulysses-attach/{training}", self._vote()) == "own":
                self._note("own")
                return
            self.monitor = self._monitor(args, state)
            super().on_train_begin(args, state, control, **kwargs)
        except Exception as error:  # noqa: BLE001 - the training goes on without the monitor
            self._say("the training goes on without the monitor", error)
            with suppress(Exception):
                self.finish("failed")
            return
        self._watches = True
        if rank() == 0:
            self._note("recorded", str(self.monitor.run_dir))
        else:
            self._note("elsewhere")

    def _vote(self) -> str:
        """``own`` where another callback watches this training, else ``watch``."""
        callbacks = calling_trainer(self).callback_handler.callbacks
        watching = [c for c in callbacks if isinstance(c, MonitorCallback)]
        # Of several of this kind (callbacks handed on from Trainer to Trainer) the first watches.
        others = [c for c in watching if not isinstance(c, AttachedCallback)]
        return "own" if others or watching[0] is not self else "watch"

    def _monitor(
        self, args: TrainingArguments | None = None, state: TrainerState | None = None
    ) -> Monitor:
        """The monitor of a training that begins; before that, one that records nothing."""
        settings = self.settings
        place, if_exists = settings.run_dir, settings.if_exists
        config: dict[str, Any] = {}
        if args is not None and state is not None and rank() == 0:
            output_dir = str(args.output_dir)
            place, if_exists = choose_place(settings, output_dir, state.global_step)
            config = {"attach": origin(settings, output_dir)}
        return Monitor(
            place,
            tensorboard=settings.tensorboard,
            sample_every=settings.sample_every,
            if_exists=if_exists,
            config=config,
        )

    def _note(self, outcome: Outcome, text: str = "") -> None:
        write_note(self.settings.notes, Note(outcome, text))

    def _say(self, what: str, error: Exception) -> None:
        """Says once for each training what the monitor could not do."""
        if self._spoke:
            return
        self._spoke = True
        known = isinstance(error, InputError)
        reason = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
        if rank() == 0 or isinstance(error, NotAttachedError):
            self._note("failed", reason)
        if rank() == 0:
            # Not logged: the user's own script decides where logging goes, if anywhere.
            sys.stderr.write(f"ulysses: {what}: {reason}\n")


def _harmless(name: str) -> Callable[..., Any]:
    """The event `name` of a `MonitorCallback`, which happens only while a training is watched."""
    event = getattr(MonitorCallback, name)

    @functools.wraps(event)
    def happens(self: AttachedCallback, *args: Any, **kwargs: Any) -> Any:
        if not self._watches:
            return None
        try:
            return event(self, *args, **kwargs)
        except TrainingStoppedError:  # on purpose: a rule or a policy asked for it
            raise
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            self._say(f"the monitor failed in {name}, the training goes on", error)
            return None

    return happens


# All events, so that none which MonitorCallback learns later is forgotten here.
for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    if _event not in vars(AttachedCallback):
        setattr(AttachedCallback, _event, _harmless(_event))

"""The callback of ``report_to="ulysses"``: it watches as `Monitor.attach` does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ulysses_monitor.engines import Engine
from ulysses_monitor.integrations.callback import MonitorCallback, TrainerWatcher
from ulysses_monitor.integrations.reporting.settings import ReportSettings
from ulysses_monitor.integrations.trainer_lookup import calling_trainer
from ulysses_monitor.session.open_sessions import start_session
from ulysses_monitor.session.opening import Training
from ulysses_monitor.session.places import choose_place
from ulysses_monitor.session.session import Session

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["ReportCallback"]


class ReportCallback(TrainerWatcher):
    """Opens a session for each training, unless the Trainer has another monitor.

    transformers makes it, without arguments.

    Args:
        settings: how to record; what `register` was given by default.
    """

    given: ClassVar[ReportSettings] = ReportSettings()
    """What `register` was given."""
    _latest: ClassVar[dict[Path, Path]] = {}
    """The run directory of this process's latest training, by the one of its first."""

    def __init__(self, settings: ReportSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or self.given

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the training's session if nobody else watches it."""
        self.finish("failed")  # a training of this Trainer that raised before
        callbacks = calling_trainer(self).callback_handler.callbacks
        others = [c for c in callbacks if isinstance(c, MonitorCallback | ReportCallback)]
        # Of several of this kind (callbacks handed on from Trainer to Trainer) the first watches.
        if all(isinstance(c, ReportCallback) for c in others) and others[0] is self:
            super().on_train_begin(args, state, control, **kwargs)

    def open_session(self, trainer: Trainer, engine: Engine, training: Training) -> Session:
        """Opens a session in the next run directory."""
        first = self.settings.first_dir(Path(trainer.args.output_dir or ".", "ulysses"))
        monitor = self.settings.monitor
        place = choose_place(
            first,
            monitor.if_exists,
            previous=self._latest.get(first),
            step=training.step,
            info=training.info,
            device=engine.device,
        )
        session = start_session(place, monitor, monitor.make_parts(), engine, training, {})
        self._latest[first] = session.run_dir
        return session

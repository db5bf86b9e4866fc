"""The tracker of accelerate's ``log_with="ulysses"``: records the numbers that a loop logs.

Gradients need `Monitor.watch`. Inside it, the numbers go to its run; elsewhere to a run of their
own. `ulysses attach` imports this module with accelerate, so torch-heavy parts are imported when a
run begins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.tracking import GeneralTracker

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.ranks import rank

if TYPE_CHECKING:
    from ulysses_monitor.integrations.reporting.settings import ReportSettings
    from ulysses_monitor.session.places import Place
    from ulysses_monitor.session.process_exit import Status
    from ulysses_monitor.session.recording import Recording
    from ulysses_monitor.session.session import Session
    from ulysses_monitor.session.settings import MonitorSettings
    from ulysses_monitor.store import IfExists

__all__ = ["UlyssesTracker"]


class UlyssesTracker(GeneralTracker):
    """Records what ``accelerator.log`` is given.

    accelerate makes it. Everything happens on the main process, and a failure costs numbers, never
    the training.

    Args:
        run_name: the project's name; the run directory is ``runs/<run_name>`` by default.
        settings: ``run_dir`` and what else `register` takes, in place of what that was given.

    Raises:
        InputError: a setting is wrong.
    """

    name = "ulysses"
    requires_logging_directory = False
    given: ClassVar[ReportSettings | None] = None
    """What `register` was given."""

    def __init__(self, run_name: str, **settings: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.run_dir: Path | None = None
        self._own = settings
        self._config: dict[str, Any] = {}
        self._described: Session | None = None
        self._recording: Recording | None = None
        self._step = 0
        self._guard = Guard()
        if settings:
            self._choose()  # what is wrong is said now

    @property
    def tracker(self) -> UlyssesTracker:
        """What accelerate hands out as the tracker itself."""
        return self

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keeps `values` for the run's run.json."""
        self._config |= dict(values)
        self._described = None  # the open run does not know them yet

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Records the numbers in `values`.

        Args:
            values: numbers by name; see `name_logged`.
            step: the step; the one after the last by default. Inside `Monitor.watch`, numbers
                belong to the step of its run.
        """
        if rank() == 0:
            self._guard.call("tracker", lambda: self._log(values, step), None)

    def finish(self) -> None:
        """Ends the run, if it is the tracker's own."""
        self._guard.call("end of the tracker", lambda: self._close("finished"), None)

    def _log(self, values: Mapping[str, Any], step: int | None) -> None:
        from ulysses_monitor.records.trainer_names import name_logged
        from ulysses_monitor.session.open_sessions import latest_session

        numbers = {name: _to_number(value) for name, value in values.items()}
        if (session := latest_session()) is not None:
            if self._described is not session and self._config:
                session.describe({"tracker_config": self._config})
            self._described = session
            session.log(name_logged(numbers, is_measured=True))
            return
        self._step = self._step + 1 if step is None else int(step)
        self._publish(name_logged(numbers, is_measured=False))

    def _publish(self, numbers: Mapping[str, float]) -> None:
        from ulysses_monitor.records import StepRecord

        if self._recording is None:
            self._recording = self._open()
        if numbers:
            self._recording.publish(StepRecord.of(self._step, time.time(), dict(numbers)))

    def _open(self) -> Recording:
        """Opens a run of the tracker's own."""
        from ulysses_monitor.common.environment import describe_environment
        from ulysses_monitor.session.places import claim
        from ulysses_monitor.session.recording import Recording

        place, settings = self._choose()

        def take(path: Path, if_exists: IfExists) -> Recording:
            return Recording(
                path,
                if_exists,
                {**describe_environment(), "engine": "not watched", "config": self._config},
                sinks=settings.make_parts().sinks,
                tensorboard=settings.tensorboard,
                mirror=settings.mirror,
                on_exit=self._close,
            )

        recording = claim(place, take)
        self.run_dir = recording.run_dir
        return recording

    def _close(self, status: Status) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.close(status, self._step, {})

    def _choose(self) -> tuple[Place, MonitorSettings]:
        """Chooses where a run of the tracker's own is recorded, and how."""
        from ulysses_monitor.integrations.reporting.settings import ReportSettings
        from ulysses_monitor.session.places import Place

        settings = self.given or ReportSettings()
        if self._own:
            settings = ReportSettings.read(self._own, "tracker ulysses")
        first = settings.first_dir(Path("runs", self.run_name))
        return Place(first, settings.monitor.if_exists), settings.monitor


def _to_number(value: Any) -> Any:
    """Returns the number in a tensor or array of one element, anything else as it is."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, ValueError):  # not one, or of several elements
        return value

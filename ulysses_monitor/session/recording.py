"""What rank 0 holds of an open run: its directory, the bus with its sinks, and the mirror."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ulysses_monitor.bus import Bus
from ulysses_monitor.common.extras import is_installed
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.session.process_exit import ProcessExit, Status
from ulysses_monitor.sinks import Sink, TensorBoardSink
from ulysses_monitor.store import IfExists, MirrorSink, RunDirectory, StoreSink

__all__ = ["NoRecording", "Recorder", "Recording"]

logger = logging.getLogger(__name__)

_MIRROR_SECONDS = 60.0
"""Longest wait for the last copy to arrive."""


class Recorder(Protocol):
    """Takes what one rank of a session has to record."""

    is_recording: bool
    """Whether anything comes of it."""

    def publish(self, item: StepRecord | Event) -> None:
        """Hands an item to every sink; never waits, never raises."""
        ...

    def describe(self, info: Mapping[str, Any]) -> None:
        """Adds entries to run.json."""
        ...

    def dropped(self) -> dict[str, int]:
        """Returns the number of items that each sink lost so far."""
        ...

    def close(self, status: Status, step: int, about: Mapping[str, Any]) -> None:
        """Writes everything out and ends the run."""
        ...


class NoRecording:
    """The recorder of every rank but 0, whose numbers rank 0 records."""

    is_recording = False

    def publish(self, item: StepRecord | Event) -> None:
        """Does nothing."""

    def describe(self, info: Mapping[str, Any]) -> None:
        """Does nothing."""

    def dropped(self) -> dict[str, int]:
        """Returns nothing."""
        return {}

    def close(self, status: Status, step: int, about: Mapping[str, Any]) -> None:
        """Does nothing."""


class Recording:
    """Opens a run directory and its sinks.

    Args:
        run_dir: the run directory.
        if_exists: what to do with a run that is there already.
        info: entries for run.json.
        sinks: sinks beside the run store.
        tensorboard: whether to write TensorBoard files, if TensorBoard is installed; a
            `TensorBoardSink` of the user's own takes the place of ours.
        mirror: a URL that gets a copy of the directory.
        on_exit: closes the session when the process ends.

    Attributes:
        run_dir: the run directory.

    Raises:
        InputError: the directory is taken, or the mirror cannot be used.
        OSError: the directory cannot be written.
    """

    is_recording = True

    def __init__(
        self,
        run_dir: Path,
        if_exists: IfExists,
        info: Mapping[str, Any],
        *,
        sinks: Sequence[Sink],
        tensorboard: bool,
        mirror: str | None,
        on_exit: Callable[[Status], None],
    ) -> None:
        replace = if_exists == "overwrite"
        copies = [] if mirror is None else [MirrorSink(run_dir, mirror, replace=replace)]
        self._directory = RunDirectory(run_dir, if_exists)
        self._directory.start(info)
        self.run_dir = run_dir
        own: list[Sink] = [StoreSink(self._directory)]
        if tensorboard and not any(isinstance(sink, TensorBoardSink) for sink in sinks):
            own += _make_tensorboard()
        self._bus = Bus([*own, *sinks], (run_dir, self._directory.info))
        self._mirror = Bus(copies, report=self._bus.report)
        self._process = os.getpid()
        self._exit = ProcessExit(on_exit)

    def publish(self, item: StepRecord | Event) -> None:
        """Hands an item to every sink; never waits, never raises."""
        self._bus.publish(item)
        self._mirror.publish(item)

    def describe(self, info: Mapping[str, Any]) -> None:
        """Adds entries to run.json."""
        self._directory.describe(info)

    def dropped(self) -> dict[str, int]:
        """Returns the number of items that each sink lost so far."""
        return self._bus.dropped() | self._mirror.dropped()

    def close(self, status: Status, step: int, about: Mapping[str, Any]) -> None:
        """Records the end, writes everything out and ends the run.

        Args:
            status: how it ended.
            step: the last optimizer step.
            about: how it ended, for the stop event: ``reason`` if a policy or a person stopped it,
                ``error`` and ``log`` if it failed, ``peak_memory``. run.json has all but ``log``.
        """
        with self._exit.closing():
            status = self._exit.judge("stopped" if "reason" in about else status)
            data = {"status": status, **about}
            self.publish(Event(kind="stop", step=step, time=time.time(), data=data))
            if os.getpid() == self._process:  # not in a forked child: the run is not its own
                brief = {key: value for key, value in about.items() if key != "log"}
                self._write_out(status, {"last_step": step, **brief})

    def _write_out(self, status: Status, about: Mapping[str, Any]) -> None:
        all_ended = False
        try:
            all_ended = self._bus.close()
        finally:
            # If a sink still writes, the directory stays locked as long as the process lives.
            self._finish(status, about, release=all_ended)
        self._mirror.close(_MIRROR_SECONDS)  # last, when everything is written

    def _finish(self, status: Status, about: Mapping[str, Any], *, release: bool) -> None:
        try:
            self._directory.finish(status, about, release=release)
        except OSError as error:  # a full disk must not fail a training that is done
            logger.error("monitor: run.json of %s: %s", self._directory.path, error)


def _make_tensorboard() -> list[Sink]:
    """Returns the TensorBoard sink; none if TensorBoard, an optional dependency, is missing."""
    if is_installed("tensorboard"):
        return [TensorBoardSink()]
    logger.warning(
        "monitor: TensorBoard is not installed, so this run has no TensorBoard files; run "
        "pip install 'ulysses-toolkit[tensorboard]', or set tensorboard=False"
    )
    return []

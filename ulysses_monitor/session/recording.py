"""What rank 0 holds of a run that is being recorded: its directory, the bus, and the mirror."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ulysses_monitor.bus import Bus
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.session.lifecycle import Status
from ulysses_monitor.sinks import Sink, TensorBoardSink
from ulysses_monitor.store import IfExists, MirrorSink, RunDirectory, StoreSink

__all__ = ["Recording"]

logger = logging.getLogger(__name__)

_MIRROR_SECONDS = 60.0
"""Longest wait for the last copy to arrive."""


class Recording:
    """Opens a run directory and its sinks.

    Args:
        run_dir: the run directory.
        if_exists: what to do with a run that is there already.
        info: for run.json.
        sinks: beside the run store.
        tensorboard: whether to write TensorBoard files; a `TensorBoardSink` of the user's own
            takes the place of ours.
        mirror: a URL that gets a copy of the directory.

    Raises:
        InputError: the directory is taken, or the mirror cannot be.
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        if_exists: IfExists,
        info: Mapping[str, Any],
        *,
        sinks: Sequence[Sink] = (),
        tensorboard: bool = True,
        mirror: str | None = None,
    ) -> None:
        replace = if_exists == "overwrite"
        copies = [] if mirror is None else [MirrorSink(run_dir, mirror, replace=replace)]
        self._directory = RunDirectory(run_dir, if_exists)
        self._directory.start(info)
        own: list[Sink] = [StoreSink(self._directory)]
        if tensorboard and not any(isinstance(sink, TensorBoardSink) for sink in sinks):
            own.append(TensorBoardSink())
        self._bus = Bus([*own, *sinks], (run_dir, self._directory.info))
        self._mirror = Bus(copies, report=self._bus.report)
        self._process = os.getpid()

    def publish(self, item: StepRecord | Event) -> None:
        """Hands an item to every sink; never waits, never raises."""
        self._bus.publish(item)
        self._mirror.publish(item)

    def dropped(self) -> dict[str, int]:
        """Items that each sink lost so far."""
        return self._bus.dropped() | self._mirror.dropped()

    def close(self, status: Status) -> None:
        """Writes everything out and ends the run."""
        if os.getpid() != self._process:
            return  # a forked child: the run is not its own
        ended = False
        try:
            ended = self._bus.close()
        finally:
            self._finish(status, ended)
        self._mirror.close(_MIRROR_SECONDS)  # last, when everything is written

    def _finish(self, status: Status, ended: bool) -> None:
        """Where a sink still writes, the directory stays locked as long as the process lives."""
        try:
            self._directory.finish(status, release=ended)
        except OSError as error:  # a full disk must not fail a training that is done
            logger.error("monitor: run.json of %s: %s", self._directory.path, error)

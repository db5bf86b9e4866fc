"""The TensorBoard sink: totals, layers, percentiles over LoRA modules, a picture of the layers.

One tag per parameter would make TensorBoard unusable on a real model, so the values of single
parameters and modules have tags only where they are asked for; the run store has all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.arguments import PathLike, Patterns
from ulysses_monitor.sinks.tensorboard.plan import Shown

if TYPE_CHECKING:
    from ulysses_monitor.sinks.tensorboard.event_file import EventFile
    from ulysses_monitor.sinks.tensorboard.translation import Translation

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes a run's event file.

    A step is one event. A value that is not finite leaves no point: the Text tab says which and
    when. Where steps begin again, by a resumed training, readers drop those trained before.

    Args:
        directory: where the event file goes; ``tensorboard`` in the run directory if not given.
        parameters: patterns of metrics of single parameters or modules that get tags of their own,
            such as ``grad/norm/param/*embed*``; ``*`` also matches ``/``.
        histograms: patterns of such metrics whose distribution over parameters or modules is
            shown, every 10 steps; True for the gradient norms of all parameters.
        picture_every: steps between two pictures of the layers' gradient norms, at least; 0 for
            none. The last one is drawn at the end.

    Raises:
        InputError: an argument is wrong.
    """

    name = "tensorboard"

    @checked_arguments("sink tensorboard")
    def __init__(
        self,
        directory: PathLike | None = None,
        *,
        parameters: Patterns = (),
        histograms: Patterns | bool = False,
        picture_every: Annotated[int, Field(ge=0, le=10**9)] = 100,
    ) -> None:
        if isinstance(histograms, bool):
            histograms = ("grad/norm/param/*",) if histograms else ()
        self._shown = Shown(parameters, histograms)
        self._picture_every = picture_every
        self._given = None if directory is None else Path(directory)
        self._directory = self._given
        self._file: EventFile | None = None
        self._translation: Translation | None = None
        self._waiting: tuple[StepRecord | Event, list[Any]] | None = None

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:  # noqa: ARG002 - as sinks have it
        """Learns the place; the file itself is made by the first `write`."""
        self._directory = self._given or run_dir / "tensorboard"

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            InputError: there is no directory and no run directory.
            OSError: the disk refuses; the item can be given again, and is then written whole.
        """
        file, translation = self._opened()
        if self._waiting is None or self._waiting[0] is not item:
            self._waiting = item, translation.events(item)
        file.append(*self._waiting[1])
        self._waiting = None

    def flush(self) -> None:
        """Nothing to do: `write` leaves nothing behind."""

    def close(self) -> None:
        """Draws the last picture and closes the file; a `write` after it begins another file."""
        file, translation = self._file, self._translation
        self._file = self._translation = self._waiting = None
        if file is None or translation is None:
            return
        try:
            file.append(*translation.last_events(time.time()))
        finally:
            file.close()

    def _opened(self) -> tuple[EventFile, Translation]:
        # TensorBoard takes a while to load, and only those who write for it need it.
        from ulysses_monitor.sinks.tensorboard.event_file import EventFile
        from ulysses_monitor.sinks.tensorboard.translation import Translation

        if self._file is None or self._translation is None:
            if self._directory is None:
                raise InputError("sink tensorboard: no run directory; give it a directory")
            self._translation = Translation(self._shown, self._picture_every)
            self._file = EventFile(self._directory)
        return self._file, self._translation

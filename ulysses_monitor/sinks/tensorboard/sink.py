"""The TensorBoard sink: totals, layers, percentiles over LoRA modules, a picture of the layers.

One tag per parameter would make TensorBoard unusable for a real model, so single parameters and
modules get tags only on request. The run store has all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.extras import is_installed
from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.arguments import PathLike, Patterns, require_library
from ulysses_monitor.sinks.tensorboard.plan import Planner

if TYPE_CHECKING:
    from ulysses_monitor.sinks.tensorboard.event_file import EventFile
    from ulysses_monitor.sinks.tensorboard.translation import Translator

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes the event file of a run.

    Each step is one event. NaN and Inf leave no point; the Text tab shows which values and when.
    If a resumed training repeats steps, readers drop the earlier ones.

    Args:
        directory: where the event file goes; ``tensorboard`` in the run directory by default.
        parameters: patterns of metrics of single parameters or modules that get their own tags,
            such as ``grad/norm/param/*embed*``; ``*`` also matches ``/``.
        histograms: patterns of such metrics to show as distributions over parameters or modules,
            every 10 steps; True for the gradient norms of all parameters.
        picture_every: fewest steps between two pictures of the layers' gradient norms; 0 for none.
            The last picture is drawn at the end.

    Raises:
        InputError: an argument is wrong, or TensorBoard is not installed.
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
        require_library(self.name, "tensorboard.compat")
        if isinstance(histograms, bool):
            histograms = ("grad/norm/param/*",) if histograms else ()
        self._planner = Planner(parameters, histograms)
        self._picture_every = picture_every
        self._given = None if directory is None else Path(directory)
        self._directory = self._given
        self._file: EventFile | None = None
        self._translator: Translator | None = None
        self._waiting: tuple[StepRecord | Event, list[Any]] | None = None

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:  # noqa: ARG002 - as sinks have it
        """Sets the directory; the first `write` creates the file."""
        self._directory = self._given or run_dir / "tensorboard"

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            InputError: neither a directory nor a run directory is known.
            OSError: the disk is full or unwritable; the item can be written again.
        """
        file, translator = self._open_file()
        if self._waiting is None or self._waiting[0] is not item:
            self._waiting = item, translator.events(item)
        file.append(*self._waiting[1])
        self._waiting = None

    def flush(self) -> None:
        """Does nothing, because `write` buffers nothing."""

    def close(self) -> None:
        """Draws the last picture and closes the file; a later `write` starts another file."""
        file, translator = self._file, self._translator
        self._file = self._translator = self._waiting = None
        if file is None or translator is None:
            return
        try:
            file.append(*translator.last_events(time.time()))
        finally:
            file.close()

    def _open_file(self) -> tuple[EventFile, Translator]:
        # Imported late: TensorBoard takes a while to load.
        from ulysses_monitor.sinks.tensorboard.event_file import EventFile
        from ulysses_monitor.sinks.tensorboard.translation import Translator

        if self._file is None or self._translator is None:
            if self._directory is None:
                raise InputError(
                    "sink tensorboard: directory is None and there is no run directory; expected a "
                    "directory"
                )
            # Only the pictures need matplotlib.
            pictures = self._picture_every if is_installed("matplotlib") else 0
            self._translator = Translator(self._planner, pictures)
            self._file = EventFile(self._directory)
        return self._file, self._translator

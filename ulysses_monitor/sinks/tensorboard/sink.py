"""The TensorBoard sink: totals, layers, percentiles over LoRA modules, a picture of the layers.

One tag per parameter would make TensorBoard unusable on a real model, so the values of single
parameters and modules have tags only where they are asked for; the run store has all of them.
"""

from __future__ import annotations

import logging
import re
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ulysses_monitor.errors import InputError
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.sinks.tensorboard.pictures import LayerPictures
from ulysses_monitor.sinks.tensorboard.plan import Plan, Shown

if TYPE_CHECKING:
    from ulysses_monitor.sinks.tensorboard.heat_map import Picture
    from ulysses_monitor.sinks.tensorboard.summaries import Scalars

__all__ = ["TensorBoardSink"]

logger = logging.getLogger(__name__)

_HISTOGRAM_EVERY = 10
_NAMED = 8
"""Metrics that a text names before it says how many more there are."""


class TensorBoardSink:
    """Writes a run's event file.

    A step is one event. A value that is not finite leaves no point: the Text tab says which and
    when. Where steps begin again, by a resumed training, readers drop those trained before.

    Args:
        directory: where the event file goes.
        parameters: patterns of metrics of single parameters or modules that get tags of their own,
            such as ``grad/norm/param/*embed*``; ``*`` also matches ``/``.
        histograms: patterns of such metrics whose distribution over parameters or modules is
            shown, every 10 steps; True for the gradient norms of all parameters.
        picture_every: steps between two pictures of the layers' gradient norms, at least; 0 for
            none. The last one is drawn at the end.

    Raises:
        InputError: an argument is wrong.
        OSError: the event file cannot be made.
    """

    name = "tensorboard"

    def __init__(
        self,
        directory: Path,
        *,
        parameters: Sequence[str] = (),
        histograms: bool | Sequence[str] = False,
        picture_every: int = 100,
    ) -> None:
        # TensorBoard takes a while to load, and only those who write for it need it.
        from ulysses_monitor.sinks.tensorboard import summaries
        from ulysses_monitor.sinks.tensorboard.event_file import EventFile

        if picture_every < 0:
            raise InputError(
                f"TensorBoardSink: picture_every is {picture_every}; allowed is 0 or more"
            )
        if isinstance(histograms, bool):
            histograms = ("grad/norm/param/*",) if histograms else ()
        self._shown = Shown(parameters, histograms)
        self._pictures = LayerPictures(picture_every)
        self._known: weakref.WeakKeyDictionary[Schema, _Known] = weakref.WeakKeyDictionary()
        self._step: int | None = None
        self._told_of_hidden = False
        self._histogram_steps: dict[str, int] = {}
        self._make = summaries
        self._file = EventFile(Path(directory))
        self._append(summaries.layout(), 0, time.time())

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        self._follow(item)
        if isinstance(item, StepRecord):
            self._write_record(item)
        elif item.kind == "alert":
            self._write_alert(item)

    def flush(self) -> None:
        """Nothing to do: `write` leaves nothing behind."""

    def close(self) -> None:
        """Draws the last picture and closes the file."""
        try:
            if last := self._pictures.last():
                self._write_picture(*last, time.time())
        finally:
            self._file.close()

    def _follow(self, item: StepRecord | Event) -> None:
        """Notes where steps begin, and where they begin again."""
        starts = isinstance(item, Event) and item.kind == "start"
        if starts or self._step is None or item.step < self._step:
            first = max(1, item.step + 1 if starts else item.step)
            self._file.restart(first, item.time)
        self._step = item.step

    def _write_record(self, record: StepRecord) -> None:
        known = self._known.get(record.schema)
        if known is None:
            plan = self._shown.plan(record.schema)
            known = self._known[record.schema] = _Known(plan, self._make.Scalars(plan.tags))
        values = known.plan.values(record.values)
        if len(values):
            self._file.append(known.scalars.fill(values, record.step, record.time))
        self._say_hidden(known.plan, record)
        self._say_broken(known, values, record)
        self._write_histograms(known.plan, record)
        norms = known.plan.layer_norms(record.values)
        picture = self._pictures.add(record.step, record.time, known.plan.layers, norms)
        if picture is not None:
            self._write_picture(record.step, picture, record.time)

    def _say_hidden(self, plan: Plan, record: StepRecord) -> None:
        if plan.hidden and not self._told_of_hidden:
            self._told_of_hidden = True
            words = (
                f"per-parameter metrics are in the run store: {plan.hidden:,} metrics; ask for "
                "them with parameters=[...]"
            )
            logger.info("monitor: TensorBoard shows %d metrics; %s", len(plan.tags), words)
            self._append(self._make.text("about", words), record.step, record.time)

    def _say_broken(
        self, known: _Known, values: npt.NDArray[np.float32], record: StepRecord
    ) -> None:
        """Says which values leave no point, whenever these are others than before."""
        broken = np.flatnonzero(~np.isfinite(values)).tolist()
        if broken != known.broken:
            known.broken = broken
            words = _broken(known.plan.tags, values, broken)
            text = f"step {record.step:,}: {words}"
            self._append(self._make.text("not finite", text), record.step, record.time)

    def _write_histograms(self, plan: Plan, record: StepRecord) -> None:
        for tag, places in plan.histograms.items():
            values = record.values[places]
            finite = values[np.isfinite(values)]
            last = self._histogram_steps.get(tag, -_HISTOGRAM_EVERY)
            if len(finite) and not 0 <= record.step - last < _HISTOGRAM_EVERY:
                self._histogram_steps[tag] = record.step
                self._append(self._make.histogram(tag, finite), record.step, record.time)

    def _write_picture(self, step: int, picture: Picture, wall_time: float) -> None:
        summary = self._make.picture("grad/norm/layers", picture.png, picture.size)
        self._append(summary, step, wall_time)

    def _write_alert(self, event: Event) -> None:
        data = {key: self._make.escaped(str(value)) for key, value in event.data.items()}
        words = f"**{data.get('severity', 'alert')}**: {data.get('message', '')}"
        text = f"{words} {data.get('hint', '')}".strip()
        # A tag for each rule: readers keep one entry of a tag for a step.
        tag = f"alerts/{re.sub(r'[^A-Za-z0-9_.-]', '_', str(event.data.get('rule', 'alert')))}"
        self._append(self._make.text(tag, text), event.step, event.time)

    def _append(self, summary: Any, step: int, wall_time: float) -> None:
        self._file.append(self._make.event(summary, step, wall_time))


@dataclass
class _Known:
    """What the sink keeps of a schema, and which of its values were last not finite."""

    plan: Plan
    scalars: Scalars
    broken: list[int] = field(default_factory=list)


def _broken(tags: Sequence[str], values: npt.NDArray[np.float32], broken: Sequence[int]) -> str:
    if not broken:
        return "all values are finite again"
    named = ", ".join(f"`{tags[i]}` = {values[i]}" for i in broken[:_NAMED])
    more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    return f"{len(broken)} of {len(tags)} values are not finite and leave no point: {named}{more}"

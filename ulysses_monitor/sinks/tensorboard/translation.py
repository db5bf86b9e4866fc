"""Records and events of a run, as TensorBoard's events."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event as EventProto
from tensorboard.compat.proto.summary_pb2 import Summary

from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.sinks.tensorboard import summaries
from ulysses_monitor.sinks.tensorboard.event_file import restart
from ulysses_monitor.sinks.tensorboard.pictures import LayerPictures
from ulysses_monitor.sinks.tensorboard.plan import Plan, Planner

__all__ = ["Translator"]

logger = logging.getLogger(__name__)

_HISTOGRAM_EVERY = 10
_NAMED = 8
"""Metrics that a text names before it says how many more there are."""
_PICTURE = "grad/norm/layers"
_NO_TAG = re.compile(r"[^A-Za-z0-9_.-]")

Values = npt.NDArray[np.float32]


class Translator:
    """Turns items into events; remembers what was said already, for one event file.

    Args:
        planner: decides what of a record is shown.
        picture_every: steps between two pictures of the layers; 0 for none.
    """

    def __init__(self, planner: Planner, picture_every: int) -> None:
        self._planner = planner
        self._pictures = LayerPictures(picture_every)
        self._known: weakref.WeakKeyDictionary[Schema, _Known] = weakref.WeakKeyDictionary()
        self._step: int | None = None
        self._told_of_hidden = False
        self._histogram_steps: dict[str, int] = {}

    def events(self, item: StepRecord | Event) -> list[EventProto]:
        """The events of an item: where steps begin, the values, and what else there is to say."""
        begins = self._beginning(item)
        if isinstance(item, StepRecord):
            return [*begins, *self._of_record(item)]
        if item.kind == "alert":
            return [*begins, summaries.event(_alert(item), item.step, item.time)]
        return begins

    def last_events(self, now: float) -> list[EventProto]:
        """What is left to say at the end: the last picture."""
        last = self._pictures.last()
        if last is None:
            return []
        step, picture = last
        summary = summaries.picture(_PICTURE, picture.png, picture.size)
        return [summaries.event(summary, step, now)]

    def _beginning(self, item: StepRecord | Event) -> list[EventProto]:
        first_item, starts = self._step is None, isinstance(item, Event) and item.kind == "start"
        again = self._step is not None and item.step < self._step
        self._step = item.step
        if not (first_item or starts or again):
            return []
        events = [restart(max(1, item.step + 1 if starts else item.step), item.time)]
        if first_item:
            events.insert(0, summaries.event(summaries.layout(), 0, item.time))
        return events

    def _of_record(self, record: StepRecord) -> Iterator[EventProto]:
        known = self._known.get(record.schema)
        if known is None:
            known = self._known[record.schema] = _Known(self._planner.plan(record.schema))
        values = known.plan.values(record.values)
        if len(values):
            yield known.scalars.fill(values, record.step, record.time)
        for summary in self._of_values(known, values, record):
            yield summaries.event(summary, record.step, record.time)

    def _of_values(self, known: _Known, values: Values, record: StepRecord) -> Iterator[Summary]:
        if known.plan.hidden and not self._told_of_hidden:
            self._told_of_hidden = True
            yield _hidden(known.plan)
        if said := known.say_broken(values, record.step):
            yield said
        yield from self._histograms(known.plan, record)
        norms = known.plan.layer_norms(record.values)
        picture = self._pictures.add(record.step, record.time, known.plan.layers, norms)
        if picture is not None:
            yield summaries.picture(_PICTURE, picture.png, picture.size)

    def _histograms(self, plan: Plan, record: StepRecord) -> Iterator[Summary]:
        for tag, places in plan.histograms.items():
            values = record.values[places]
            finite = values[np.isfinite(values)]
            last = self._histogram_steps.get(tag, -_HISTOGRAM_EVERY)
            if len(finite) and not 0 <= record.step - last < _HISTOGRAM_EVERY:
                self._histogram_steps[tag] = record.step
                yield summaries.histogram(tag, finite)


@dataclass
class _Known:
    """What is kept of a schema, and which of its values were last not finite."""

    plan: Plan
    scalars: summaries.Scalars = field(init=False)
    broken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scalars = summaries.Scalars(self.plan.tags)

    def say_broken(self, values: Values, step: int) -> Summary | None:
        """Which values leave no point, whenever these are others than before."""
        broken = np.flatnonzero(~np.isfinite(values)).tolist()
        if broken == self.broken:
            return None
        self.broken = broken
        words = _broken(self.plan.tags, values, broken)
        return summaries.text("not finite", f"step {step:,}: {words}")


def _hidden(plan: Plan) -> Summary:
    words = (
        f"per-parameter metrics are in the run store: {plan.hidden:,} metrics; ask for them with "
        "parameters=[...]"
    )
    logger.info("monitor: TensorBoard shows %d metrics; %s", len(plan.tags), words)
    return summaries.text("about", words)


def _broken(tags: Sequence[str], values: Values, broken: Sequence[int]) -> str:
    if not broken:
        return "all values are finite again"
    named = ", ".join(f"`{tags[i]}` = {values[i]}" for i in broken[:_NAMED])
    more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    return f"{len(broken)} of {len(tags)} values are not finite and leave no point: {named}{more}"


def _alert(event: Event) -> Summary:
    data = {key: summaries.escaped(str(value)) for key, value in event.data.items()}
    words = f"**{data.get('severity', 'alert')}**: {data.get('message', '')} {data.get('hint', '')}"
    # A tag for each rule: readers keep one entry of a tag for a step.
    rule = _NO_TAG.sub("_", str(event.data.get("rule", "alert")))
    return summaries.text(f"alerts/{rule}", words.strip())

"""Translates records and events of a run to TensorBoard's events."""

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
from ulysses_monitor.records.answers import read_answers
from ulysses_monitor.sinks.tensorboard import summaries
from ulysses_monitor.sinks.tensorboard.event_file import restart
from ulysses_monitor.sinks.tensorboard.pictures import LayerPictures
from ulysses_monitor.sinks.tensorboard.plan import Plan, Planner

__all__ = ["Translator"]

logger = logging.getLogger(__name__)

_HISTOGRAM_EVERY = 10
_NAMED = 8
"""Most metrics that a text names; it counts the others."""
_PICTURE = "grad/norm/layers"
_NO_TAG = re.compile(r"[^A-Za-z0-9_.-]")

Values = npt.NDArray[np.float32]


class Translator:
    """Translates items for one event file, and remembers what it has already written.

    Args:
        planner: decides what of a record is shown.
        picture_every: fewest steps between two pictures of the layers; 0 for none.
    """

    def __init__(self, planner: Planner, picture_every: int) -> None:
        self._planner = planner
        self._pictures = LayerPictures(picture_every)
        self._states: weakref.WeakKeyDictionary[Schema, _SchemaState] = weakref.WeakKeyDictionary()
        self._step: int | None = None
        self._has_written_hidden = False
        self._histogram_steps: dict[str, int] = {}

    def events(self, item: StepRecord | Event) -> list[EventProto]:
        """Returns the events of an item: the mark of a start, values, texts and pictures."""
        start = self._start_events(item)
        if isinstance(item, StepRecord):
            return [*start, *self._record_events(item)]
        if item.kind == "alert":
            return [*start, summaries.event(_alert_text(item), item.step, item.time)]
        if item.kind == "answers":
            texts = _answer_texts(item)
            return [*start, *(summaries.event(text, item.step, item.time) for text in texts)]
        return start

    def last_events(self, now: float) -> list[EventProto]:
        """Returns the events at the end of the file: the last picture."""
        last = self._pictures.last()
        if last is None:
            return []
        step, picture = last
        summary = summaries.picture(_PICTURE, picture.png, picture.size)
        return [summaries.event(summary, step, now)]

    def _start_events(self, item: StepRecord | Event) -> list[EventProto]:
        is_first, is_start = self._step is None, isinstance(item, Event) and item.kind == "start"
        is_repeated = self._step is not None and item.step < self._step
        self._step = item.step
        if not (is_first or is_start or is_repeated):
            return []
        events = [restart(max(1, item.step + 1 if is_start else item.step), item.time)]
        if is_first:
            events.insert(0, summaries.event(summaries.layout(), 0, item.time))
        return events

    def _record_events(self, record: StepRecord) -> Iterator[EventProto]:
        state = self._states.get(record.schema)
        if state is None:
            state = self._states[record.schema] = _SchemaState(self._planner.plan(record.schema))
        values = state.plan.values(record.values)
        if len(values):
            yield state.scalars.fill(values, record.step, record.time)
        for summary in self._summaries(state, values, record):
            yield summaries.event(summary, record.step, record.time)

    def _summaries(
        self, state: _SchemaState, values: Values, record: StepRecord
    ) -> Iterator[Summary]:
        if state.plan.hidden and not self._has_written_hidden:
            self._has_written_hidden = True
            yield _hidden_text(state.plan)
        if text := state.nonfinite_text(values, record.step):
            yield text
        yield from self._histograms(state.plan, record)
        norms = state.plan.layer_norms(record.values)
        picture = self._pictures.add(record.step, record.time, state.plan.layers, norms)
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
class _SchemaState:
    """The plan of a schema, and which of its values were not finite at the last step."""

    plan: Plan
    scalars: summaries.Scalars = field(init=False)
    nonfinite: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scalars = summaries.Scalars(self.plan.tags)

    def nonfinite_text(self, values: Values, step: int) -> Summary | None:
        """Returns a text about the values that leave no point, if these have changed."""
        nonfinite = np.flatnonzero(~np.isfinite(values)).tolist()
        if nonfinite == self.nonfinite:
            return None
        self.nonfinite = nonfinite
        words = _nonfinite_words(self.plan.tags, values, nonfinite)
        return summaries.text("not finite", f"step {step:,}: {words}")


def _hidden_text(plan: Plan) -> Summary:
    words = (
        f"{plan.hidden:,} metrics of single parameters and modules are only in the run store; show "
        "some of them here with parameters=[...]"
    )
    logger.info("monitor: TensorBoard shows %d metrics; %s", len(plan.tags), words)
    return summaries.text("about", words)


def _nonfinite_words(tags: Sequence[str], values: Values, nonfinite: Sequence[int]) -> str:
    if not nonfinite:
        return "all values are finite again"
    named = ", ".join(f"`{tags[i]}` = {values[i]}" for i in nonfinite[:_NAMED])
    more = f" and {len(nonfinite) - _NAMED} more" if len(nonfinite) > _NAMED else ""
    return (
        f"{len(nonfinite)} of {len(tags)} values are not finite and leave no point: {named}{more}"
    )


def _alert_text(event: Event) -> Summary:
    data = {key: summaries.escape_markdown(str(value)) for key, value in event.data.items()}
    words = f"**{data.get('severity', 'alert')}**: {data.get('message', '')} {data.get('hint', '')}"
    # One tag for each rule, because readers keep one entry per tag and step.
    rule = _NO_TAG.sub("_", str(event.data.get("rule", "alert")))
    return summaries.text(f"alerts/{rule}", words.strip())


def _answer_texts(event: Event) -> Iterator[Summary]:
    """Yields a text for each prompt, so that TensorBoard shows its answers step by step."""
    for number, answer in enumerate(read_answers(event.data), start=1):
        parts = [("prompt", answer.prompt), ("answer", answer.text)]
        parts += [("reference", answer.reference)] if answer.reference is not None else []
        words = "\n\n".join(f"**{name}** {summaries.escape_markdown(text)}" for name, text in parts)
        yield summaries.text(f"answers/{number}", words)

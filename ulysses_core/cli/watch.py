"""`ulysses watch`: follows a run directory with the console sink's table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.console import ConsoleSink
from ulysses_monitor.sinks.console.state import HELD_OUT, LOSS, NORM, SECONDS, WATCHED

if TYPE_CHECKING:
    from ulysses_monitor.reading import RunReader

__all__ = ["Follower", "watch"]

_PAUSE = 1.0
_TAIL = 500
"""Steps that are looked at of those trained before the watching began."""


def watch(path: str | Path, console: Console | None = None) -> None:
    """Shows the run at `path` until it ends, or until Ctrl-C.

    Raises:
        InputError: there is no run.
    """
    from ulysses_monitor.reading import open_run

    run = open_run(path)
    sink = ConsoleSink(console or Console(), run_name=str(run.info.get("name", "")))
    follower = Follower(run)
    try:
        while True:
            ended = run.info.get("status") != "running"  # before the rest: nothing comes after it
            began = time.monotonic()
            for item in follower.news():
                sink.write(item)
            sink.flush()
            if ended:
                sink.write(_stop(run.info, follower.step))
                return
            # Reading a long run takes a while; it must not take all of the machine's time.
            time.sleep(max(_PAUSE, 4 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return
    finally:
        sink.close()


class Follower:
    """What is new in a run since the last look, in the order of steps.

    Args:
        run: the run.

    Attributes:
        step: the last one that was served.
    """

    def __init__(self, run: RunReader) -> None:
        self._run = run
        self.step = 0
        self._held_out = 0
        self._events = 0

    def news(self) -> Iterator[StepRecord | Event]:
        """Records and events that came since the last call."""
        # Events first: a start tells where the steps that are read next begin again.
        events = list(self._new_events())
        starts = [event for event in events if event.kind == "start"]
        if starts:
            self.step = min(self.step, starts[-1].step)
            self._held_out = min(self._held_out, starts[-1].step)
            yield starts[-1]
        others = [event for event in events if event.kind == "alert"]
        items: list[StepRecord | Event] = [*self._new_records(), *others]
        yield from sorted(items, key=lambda item: item.step)

    def _new_events(self) -> Iterator[Event]:
        frame = self._run.events()
        rows = frame.iloc[self._events :].to_dict("records")
        self._events = len(frame)
        for row in rows:
            data = {str(k): v for k, v in row.items() if not _is_missing(v)}
            kind, step, when = str(data.pop("kind", "")), data.pop("step", 0), data.pop("time", 0.0)
            yield Event(kind=kind, step=int(step), time=float(when), data=data)

    def _new_records(self) -> Iterator[StepRecord]:
        frame = self._run.metrics(*WATCHED)
        if HELD_OUT in frame:
            held_out = frame.pop(HELD_OUT).dropna()
            for step, value in held_out[held_out.index > self._held_out].items():
                self._held_out = int(str(step))
                yield StepRecord.of(self._held_out, 0.0, {HELD_OUT: float(value)})
        names = [str(name) for name in frame.columns]
        for step, row in frame[frame.index > self.step].tail(_TAIL).iterrows():
            self.step = int(str(step))
            yield StepRecord.of(self.step, 0.0, _measured(names, row))


def _measured(names: list[str], row: pd.Series[float]) -> dict[str, float]:
    """What a step recorded; in a trained step, a loss or norm that is missing was not a number."""
    values = {name: float(row[name]) for name in names}
    trained = math.isfinite(values.get(SECONDS, math.nan))
    always = (LOSS, NORM) if trained else ()
    return {n: v for n, v in values.items() if n in always or not math.isnan(v)}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _stop(info: dict[str, Any], step: int) -> Event:
    data = {"status": info.get("status", "finished")}
    return Event(kind="stop", step=step, time=time.time(), data=data)

"""`ulysses watch`: follows a run with the console sink's table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from ulysses_core.cli.tables import as_text, print_damage
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.console import ConsoleSink
from ulysses_monitor.sinks.console.state import HELD_OUT, LOSS, NORM, SECONDS, WATCHED

if TYPE_CHECKING:
    from ulysses_monitor.reading import RunReader

__all__ = ["Follower", "watch"]

_PAUSE = 1.0
_LOG_LINES = 20
"""Maximum number of log lines to show of a run that failed."""
_TAIL = 500
"""Maximum number of earlier steps to show."""


def watch(path: str | Path, console: Console | None = None) -> None:
    """Shows the run at `path` until it ends or the user presses Ctrl-C.

    Raises:
        InputError: there is no run.
    """
    from ulysses_monitor.reading import open_run

    run = open_run(path)
    run.logs_damage = False
    console = console or Console()
    sink = ConsoleSink(console, run_name=str(run.info.get("name", "")))
    follower = Follower(run)
    try:
        while True:
            # Read first, because an ended run writes nothing more.
            has_ended = run.info.get("status") != "running"
            began = time.monotonic()
            for item in follower.read_new():
                sink.write(item)
            sink.flush()
            if has_ended:
                sink.write(_make_stop(run.info, follower.step))
                sink.close()
                _print_failure(run, console)
                return
            # Reading a long run takes time; this limits it to a fifth of one core.
            time.sleep(max(_PAUSE, 4 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return
    finally:
        sink.close()
        print_damage(run)


class Follower:
    """Reads the new records and events of a run.

    Args:
        run: the run.

    Attributes:
        step: the last step that was read.
    """

    def __init__(self, run: RunReader) -> None:
        self._run = run
        self.step = 0
        self._held_out = 0
        self._events = 0

    def read_new(self) -> Iterator[StepRecord | Event]:
        """Yields the records and events since the last call, in the order of steps."""
        # Events first, because a start event says at which step a resumed run continues.
        events = list(self._read_events())
        starts = [event for event in events if event.kind == "start"]
        if starts:
            self.step = min(self.step, starts[-1].step)
            self._held_out = min(self._held_out, starts[-1].step)
            yield starts[-1]
        alerts = [event for event in events if event.kind == "alert"]
        items: list[StepRecord | Event] = [*self._read_records(), *alerts]
        yield from sorted(items, key=lambda item: item.step)

    def _read_events(self) -> Iterator[Event]:
        frame = self._run.events()
        rows = frame.iloc[self._events :].to_dict("records")
        self._events = len(frame)
        for row in rows:
            data = {str(k): v for k, v in row.items() if not _is_missing(v)}
            kind, step, when = str(data.pop("kind", "")), data.pop("step", 0), data.pop("time", 0.0)
            yield Event(kind=kind, step=int(step), time=float(when), data=data)

    def _read_records(self) -> Iterator[StepRecord]:
        frame = self._run.metrics(*WATCHED, missing="ignore")
        if HELD_OUT in frame:
            held_out = frame.pop(HELD_OUT).dropna()
            for step, value in held_out[held_out.index > self._held_out].items():
                self._held_out = int(str(step))
                yield StepRecord.of(self._held_out, 0.0, {HELD_OUT: float(value)})
        names = [str(name) for name in frame.columns]
        for step, row in frame[frame.index > self.step].tail(_TAIL).iterrows():
            self.step = int(str(step))
            yield StepRecord.of(self.step, 0.0, _select_recorded(names, row))


def _select_recorded(names: list[str], row: pd.Series[float]) -> dict[str, float]:
    """Returns the values that a step recorded.

    NaN means that a value was not recorded, except for the loss and norm of a trained step, which
    are always recorded.
    """
    values = {name: float(row[name]) for name in names}
    is_trained = math.isfinite(values.get(SECONDS, math.nan))
    always = (LOSS, NORM) if is_trained else ()
    return {n: v for n, v in values.items() if n in always or not math.isnan(v)}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _print_failure(run: RunReader, console: Console) -> None:
    """Prints why a run failed and what it logged last."""
    from ulysses_monitor.reading import read_failure

    failure = read_failure(run)
    if failure is None:
        return
    console.print(as_text(f"failed: {failure.error}", "red"), soft_wrap=True)
    for line in failure.log[-_LOG_LINES:]:
        console.print(as_text(f"  {line}", "dim"), soft_wrap=True)


def _make_stop(info: dict[str, Any], step: int) -> Event:
    data = {"status": info.get("status", "finished")}
    return Event(kind="stop", step=step, time=time.time(), data=data)

"""The console sink."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.text import Text

from ulysses_monitor.common.settings import checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks.console.live import LiveTable
from ulysses_monitor.sinks.console.state import (
    HELD_OUT,
    SECONDS,
    RunState,
    action_text,
    alert_text,
    control_text,
    engine_text,
    shown_value,
)
from ulysses_monitor.sinks.console.table import clean_text, severity_style

__all__ = ["ConsoleSink"]

_SHOWN = (
    ("loss", "train/loss/total", "{:.3f}"),
    ("grad norm", "grad/norm/total", "{:.3g}"),
    ("tokens/s", "train/tokens_per_second/total", "{:,.0f}"),
)


class ConsoleSink:
    """Shows progress, evaluations and alerts to people.

    In a terminal it redraws a table in place, and what the training prints goes above it.
    Elsewhere it prints plain lines.

    Args:
        console: where to write; standard error by default.
        every_seconds: shortest pause between two progress lines outside a terminal.
        run_name: name of the run in the table's title; that of the run directory by default.
    """

    name = "console"

    @checked_arguments("sink console")
    def __init__(
        self,
        console: Console | None = None,
        every_seconds: Annotated[float, Field(ge=0)] = 10.0,
        *,
        run_name: str = "",
    ) -> None:
        self._console = console or _standard_error()
        self._every = every_seconds
        self._printed = -math.inf
        self._unprinted: StepRecord | None = None
        self._given_name = run_name
        self._state = RunState(run_name)
        self._live: LiveTable | None = None

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the name of the run."""
        self._state = RunState(self._given_name or str(info.get("name") or run_dir.name))

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event) and item.kind == "start":
            self._state = RunState(self._state.name)
        self._state.add(item)
        if self._console.is_interactive:
            self._show(item)
        elif isinstance(item, Event):
            self._print_event(item)
        else:
            self._print_record(item)

    def flush(self) -> None:
        """Redraws the table, unless the last drawing was a moment ago."""
        if self._live is not None:
            self._live.redraw()

    def close(self) -> None:
        """Leaves the last table on the terminal and restores the streams."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    # -- in a terminal -----------------------------------------------------------------------

    def _show(self, item: StepRecord | Event) -> None:
        kind = item.kind if isinstance(item, Event) else ""
        if self._live is None and kind != "stop":
            self._live = LiveTable(self._console, self._state)
        elif self._live is not None and kind == "start":
            self._live.set_state(self._state)
        if kind == "stop":
            self.close()
        elif self._live is not None:
            self._live.redraw()

    # -- elsewhere ---------------------------------------------------------------------------

    def _print_event(self, event: Event) -> None:
        if event.kind == "start":
            self._print(f"training: {engine_text(event.data)}")
        elif event.kind == "stop" and self._unprinted is not None:
            self._print_numbers(self._unprinted)
        elif event.kind == "alert":
            self._print(
                f"alert {alert_text(event)}", severity_style(str(event.data.get("severity")))
            )
        elif event.kind == "action" and self._state.is_new_action(event):
            self._print(f"step {event.step}: {action_text(event)}")
        elif event.kind == "control":
            self._print(f"step {event.step}: {control_text(event)}")

    def _print_record(self, record: StepRecord) -> None:
        if HELD_OUT in record:
            self._print(f"step {record.step}: held-out loss {record[HELD_OUT]:.4f}")
        elif SECONDS in record:
            self._print_step(record)

    def _print_step(self, record: StepRecord) -> None:
        is_last = record.step == self._state.total
        self._unprinted = record
        if is_last or time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            self._print_numbers(record)

    def _print_numbers(self, record: StepRecord) -> None:
        self._unprinted = None
        values = [
            (label, form, shown_value(record, name))
            for label, name, form in _SHOWN
            if name in record
        ]
        text = "  ".join(f"{label} {form.format(value)}" for label, form, value in values)
        total = f"/{self._state.total}" if self._state.total else ""
        self._print(f"step {record.step}{total}  {text}")

    def _print(self, line: str, style: str = "") -> None:
        text = Text(clean_text(line, self._console.encoding), style=style)
        self._console.print(text, soft_wrap=True)


def _standard_error() -> Console:
    """Returns a console on the current standard error; never interactive on a pipe.

    FORCE_COLOR, for example, would make rich draw the table into a pipe.
    """
    is_terminal = sys.stderr.isatty()
    return Console(file=sys.stderr, force_interactive=None if is_terminal else False)

"""Shows a run's progress: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ulysses_monitor.records import Event, StepRecord

__all__ = ["ConsoleSink"]

_SHOWN = (
    ("loss", "train/loss/total", "{:.3f}"),
    ("grad norm", "grad/norm/total", "{:.3g}"),
    ("tokens/s", "train/tokens_per_second/total", "{:,.0f}"),
)


class ConsoleSink:
    """Progress, evaluations and alerts for people.

    Args:
        console: where to write; standard error if not given.
        every_seconds: pause between two lines where there is no terminal.
    """

    name = "console"

    def __init__(self, console: Console | None = None, every_seconds: float = 10.0) -> None:
        self._console = console or Console(stderr=True)
        self._every = every_seconds
        self._printed = 0.0
        self._total: int | None = None
        self._progress: Progress | None = None

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, Event):
            self._write_event(item)
        elif "eval/loss/total" in item:
            self._print(f"step {item.step}: held-out loss {item['eval/loss/total']:.4f}")
        elif "train/step_seconds/total" in item:
            self._write_step(item)

    def _write_event(self, event: Event) -> None:
        if event.kind == "start":
            self._total = event.data.get("max_steps")
            self._start(event)
        elif event.kind == "alert":
            style = "bold red" if event.data["severity"] == "critical" else "yellow"
            text = f"alert {event.data['rule']}: {event.data['message']} {event.data['hint']}"
            self._print(text, style)
        elif event.kind == "stop":
            self.close()

    def _start(self, event: Event) -> None:
        processes = event.data["world_size"]
        who = f"{processes} process{'es' if processes > 1 else ''}"
        self._print(f"training on {event.data['engine']}, {who}")
        if self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._progress = Progress(
                *columns, TextColumn("{task.description}"), console=self._console
            )
            self._progress.start()
            self._progress.add_task("", total=self._total, completed=event.step)

    def _write_step(self, record: StepRecord) -> None:
        text = "  ".join(
            f"{label} {form.format(record[name])}" for label, name, form in _SHOWN if name in record
        )
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=record.step, description=text)
        elif record.step == self._total or time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            self._print(f"step {record.step}/{self._total or '?'}  {text}")

    def _print(self, text: str, style: str = "") -> None:
        """Prints untrusted text as it is: names of metrics may hold what rich takes for markup."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

"""`ulysses runs`: lists the runs of a folder."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_core.cli.tables import as_text
from ulysses_monitor.common import formatting as fmt
from ulysses_monitor.reading import Overview, RunSet, open_runs

__all__ = ["list_runs"]

_COLORS = {
    "running": "blue",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "crashed": "red",
}
_COLUMNS = ("run", "state", "step", "loss", "alerts", "started", "time")
_NUMBERS = ("step", "loss", "alerts", "time")


def list_runs(place: str, *, as_json: bool) -> None:
    """Prints the runs at `place`, oldest first, and names the runs that cannot be read.

    Args:
        place: a folder of runs, a glob or a URL.
        as_json: print a JSON object instead of a table.

    Raises:
        InputError: there is no such folder.
    """
    runs = open_runs(place)
    for run in runs:
        run.logs_damage = False  # the problems name it
    overviews = runs.overviews()
    if as_json:
        typer.echo(json.dumps(_as_json(runs, overviews), indent=2, allow_nan=False))
        return
    if overviews:
        table, console = _make_table(overviews), Console()
        # A truncated number would be wrong, so a narrow terminal wraps lines.
        console.width = max(console.width, Console(width=10_000).measure(table).maximum)
        console.print(table, crop=False, soft_wrap=True)
        _print_errors(overviews, console)
    else:
        typer.echo(f"no runs in {place}")
    _print_problems(runs)


def _as_json(runs: RunSet, overviews: dict[str, Overview]) -> dict[str, Any]:
    """Returns an object for JSON, with NaN and Inf as text, as in events.jsonl."""
    rows = [
        dataclasses.asdict(run) | {"name": name, "damaged": dict(runs[name].damaged)}
        for name, run in overviews.items()
    ]
    for row in rows:
        if row["loss"] is not None and not math.isfinite(row["loss"]):
            row["loss"] = str(row["loss"])
    return {"runs": rows, "problems": runs.problems}


def _make_table(overviews: dict[str, Overview]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in _COLUMNS:
        table.add_column(
            column,
            justify="right" if column in _NUMBERS else "left",
            no_wrap=True,
        )
    for name, overview in overviews.items():
        table.add_row(*_make_cells(name, overview))
    return table


def _make_cells(name: str, run: Overview) -> list[Text]:
    planned = f" of {run.max_steps:,}" if run.max_steps else ""
    is_broken = run.loss is not None and not math.isfinite(run.loss)
    loss = str(run.loss) if is_broken else fmt.number(run.loss, 4)
    return [
        as_text(name),
        as_text(run.status, "red" if is_broken else _COLORS.get(run.status, "")),
        as_text(f"{run.step:,}{planned}"),
        as_text(loss, "red" if is_broken else ""),
        as_text(str(run.alerts), "yellow" if run.alerts else ""),
        as_text(fmt.when(run.started)),
        as_text(fmt.duration(run.seconds)),
    ]


def _print_errors(overviews: dict[str, Overview], console: Console) -> None:
    """Prints why runs failed, a line for each."""
    for name, run in overviews.items():
        if run.error is not None:
            console.print(as_text(f"{name} {run.status}: {run.error}", "red"), soft_wrap=True)


def _print_problems(runs: RunSet) -> None:
    console = Console(stderr=True)
    for place, reason in runs.problems.items():
        console.print(as_text(f"{place}: {reason}", "yellow"), soft_wrap=True)

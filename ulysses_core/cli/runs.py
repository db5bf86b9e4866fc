"""`ulysses runs`: the runs of a folder, one a line."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_core.cli.tables import plain
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
    """Prints the runs at `place`, oldest first, and what of them cannot be read.

    Args:
        place: a folder of runs, a glob or a URL.
        as_json: an object for machines instead of a table.

    Raises:
        InputError: there is no such folder.
    """
    runs = open_runs(place)
    found = runs.overviews()
    if as_json:
        typer.echo(json.dumps(_as_json(found, runs.problems), indent=2, allow_nan=False))
        return
    if found:
        table, console = _table(found), Console()
        # Numbers that are cut are wrong: a narrow terminal wraps the lines instead.
        console.width = max(console.width, Console(width=10_000).measure(table).maximum)
        console.print(table, crop=False, soft_wrap=True)
    else:
        typer.echo(f"no runs in {place}")
    _warn(runs)


def _as_json(found: dict[str, Overview], problems: dict[str, str]) -> dict[str, Any]:
    """JSON has no NaN and no Inf: they are text, as in events.jsonl."""
    rows = [dataclasses.asdict(each) | {"name": name} for name, each in found.items()]
    for row in rows:
        if row["loss"] is not None and not math.isfinite(row["loss"]):
            row["loss"] = str(row["loss"])
    return {"runs": rows, "problems": problems}


def _table(found: dict[str, Overview]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in _COLUMNS:
        number = column in _NUMBERS
        table.add_column(
            column,
            justify="right" if number else "left",
            no_wrap=True,
        )
    for name, each in found.items():
        table.add_row(*_cells(name, each))
    return table


def _cells(name: str, each: Overview) -> list[Text]:
    """Text that a run brought along is shown as it is, whatever rich would make of it."""
    planned = f" of {each.max_steps:,}" if each.max_steps else ""
    broken = each.loss is not None and not math.isfinite(each.loss)
    return [
        plain(name),
        plain(each.status, _COLORS.get(each.status, "")),
        plain(f"{each.step:,}{planned}"),
        plain(str(each.loss) if broken else fmt.number(each.loss, 4), "red" if broken else ""),
        plain(str(each.alerts), "yellow" if each.alerts else ""),
        plain(fmt.when(each.started)),
        plain(fmt.duration(each.seconds)),
    ]


def _warn(runs: RunSet) -> None:
    console = Console(stderr=True)
    for place, reason in runs.problems.items():
        console.print(plain(f"{place}: {reason}", "yellow"), soft_wrap=True)

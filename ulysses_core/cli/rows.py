"""`ulysses rows`: shows which rows a step trained on, and their text if the data is at hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ulysses_core.cli.row_texts import RowText, texts_of_config, texts_of_data
from ulysses_core.cli.tables import as_text, print_damage
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import open_run
from ulysses_monitor.reading.rows import StepRows, read_rows
from ulysses_monitor.records.json_ready import to_jsonable
from ulysses_monitor.records.rows import Row

__all__ = ["show_rows"]

_COLUMNS = ("rank", "micro_batch", "index", "hash", "length", "trained", "loss")
_LONGEST_TEXT = 160
"""Characters of a text in the table; JSON has more."""


def show_rows(
    place: str, step: int, *, config: Path | None, data: Path | None, as_json: bool
) -> None:
    """Prints the rows of a step, the most suspicious first.

    Args:
        place: the path or URL of the run.
        step: the optimizer step.
        config: the config that was trained; its rows are decoded.
        data: a file or folder of rows in the order of the dataset that was trained.
        as_json: print a JSON object instead of a table.

    Raises:
        InputError: there is no such run, nothing is kept of the step, or the data cannot be read.
    """
    if config is not None and data is not None:
        raise InputError("rows: --config and --data are both given; expected one of them")
    run = open_run(place)
    run.logs_damage = False
    found = read_rows(run, step)
    texts: Callable[[Row], RowText] | None = None
    if config is not None:
        texts = texts_of_config(config)
    elif data is not None:
        texts = texts_of_data(data, found.rows)
    told = [None if texts is None else texts(row) for row in found.rows]
    if as_json:
        typer.echo(json.dumps(_as_json(found, told), indent=2, allow_nan=False))
    else:
        _print(found, told)
    print_damage(run)


def _as_json(found: StepRows, texts: list[RowText | None]) -> dict[str, Any]:
    rows = [
        row.to_dict() | ({} if text is None else dataclasses.asdict(text))
        for row, text in zip(found.rows, texts, strict=True)
    ]
    about = {"step": found.step, "alerts": found.alerts, "ranks_missing": found.missing}
    result: dict[str, Any] = to_jsonable({**about, "rows": rows})
    return result


def _print(found: StepRows, texts: list[RowText | None]) -> None:
    console = Console()
    table = Table(title=f"step {found.step}: rows, the most suspicious first", title_justify="left")
    has_texts = any(text is not None for text in texts)
    for name in _COLUMNS:
        table.add_column(name.replace("_", "-"), justify="right", no_wrap=True)
    if has_texts:
        table.add_column("text", overflow="fold")
    for row, text in zip(found.rows, texts, strict=True):
        cells = [as_text(_cell(row.to_dict()[name])) for name in _COLUMNS]
        table.add_row(*cells, *([as_text(_shorten(text))] if has_texts else []))
    if not has_texts:  # a truncated hash would be of no use, so a narrow terminal wraps lines
        console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table, crop=False, soft_wrap=not has_texts)
    for message in found.alerts:
        typer.echo(as_text(f"alert: {message}").plain)
    if found.missing:
        ranks = ", ".join(map(str, found.missing))
        typer.echo(f"not all rows are known of rank {ranks}: its file is not in this directory")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else str(value)
    return str(value)


def _shorten(text: RowText | None) -> str:
    if text is None:
        return ""
    if text.text is None:
        return f"({text.note})"
    words = " ".join(text.text.split())
    short = words if len(words) <= _LONGEST_TEXT else words[: _LONGEST_TEXT - 3] + "..."
    return f"{short} ({text.note})" if text.note else short

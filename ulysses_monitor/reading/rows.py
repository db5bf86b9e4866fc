"""Which rows a step of a run trained on: from the files of the ranks, events and alerts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.rows import Row, sort_rows
from ulysses_monitor.store import read_steps

if TYPE_CHECKING:
    from ulysses_monitor.reading.reader import RunReader

__all__ = ["StepRows", "read_rows"]

_EXPECTED = "expected a run recorded with monitor.rows of 1 or more"


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        step: the step.
        rows: the most suspicious first.
        alerts: messages of the alerts that name rows of the step.
        missing: ranks of which no row is known, or not all.
    """

    step: int
    rows: list[Row]
    alerts: list[str]
    missing: list[int]


def read_rows(run: RunReader, step: int) -> StepRows:
    """Returns what a run knows of the rows of `step`.

    Raises:
        InputError: nothing is kept of the step; the message says of which steps something is.
    """
    files = read_steps(run.location)
    alerts = [e for e in run.event_list("alert") if e.get("rows")]
    gathered = {int(e["of_step"]): e for e in run.event_list("rows") if "of_step" in e}
    rows = list(files.get(step, ()))
    of_event = gathered.get(step, {})
    told = _read(of_event.get("rows", ()))
    rows += _of_other_ranks(told, rows)
    complete = {row.rank for row in rows}
    named = [e for e in alerts if e["step"] == step]
    rows += _of_other_ranks((row for e in named for row in _read(e["rows"])), rows)
    if not rows:
        raise InputError(_refusal(run, step, files, {*gathered, *(e["step"] for e in alerts)}))
    ranks = range(int(run.info.get("world_size") or 1))
    # Of a sequence group only the first rank has rows; an event has those of all that told.
    is_whole = of_event.get("ranks_told", 0) == len(ranks)
    missing = [] if is_whole else [r for r in ranks if r not in complete and not _has_file(run, r)]
    return StepRows(step, sort_rows(rows), [str(e["message"]) for e in named], missing)


def _read(found: Iterable[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for each in found:
        try:
            rows.append(Row.from_dict(each))
        except (KeyError, ValueError, TypeError):
            continue  # an event that another version wrote
    return rows


def _of_other_ranks(found: Iterable[Row], known: Iterable[Row]) -> list[Row]:
    """Returns the rows of ranks of which no row is known; each once."""
    ranks = {row.rank for row in known}
    return list(dict.fromkeys(row for row in found if row.rank not in ranks))


def _has_file(run: RunReader, rank: int) -> bool:
    return (run.location / "rows" / f"rank-{rank}.jsonl").is_file()


def _refusal(
    run: RunReader, step: int, files: Mapping[int, list[Row]], others: Iterable[int]
) -> str:
    start = f"rows: --step is {step}; "
    rest = ", ".join(map(str, sorted({*others} - files.keys())[-20:]))
    more = f", and of steps with alerts: {rest}" if rest else ""
    if files:
        return f"{start}{run} keeps the rows of steps {min(files)} to {max(files)}{more}"
    if rest:
        return f"{start}{run} keeps the rows of steps with alerts only: {rest}"
    return f"{start}{run} keeps no rows; {_EXPECTED}"

"""Runs as Arrow tables in long form: one row for each value or event, as databases expect them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ulysses_monitor.store import Block

__all__ = ["build_event_table", "build_metric_table"]

_METRICS = pa.schema(
    [
        ("run", pa.dictionary(pa.int32(), pa.string())),
        ("step", pa.int64()),
        ("time", pa.float64()),
        ("metric", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float32()),
    ]
)
_EVENTS = pa.schema(
    [
        ("run", pa.string()),
        ("kind", pa.string()),
        ("step", pa.int64()),
        ("time", pa.float64()),
        ("data", pa.string()),
    ]
)


def build_metric_table(blocks: Mapping[str, Block]) -> Any:
    """Builds a table with a row for each measured value, sorted by run and metric.

    Args:
        blocks: the metrics of each run, by run name.

    Returns:
        A `pyarrow.Table` with the columns `run`, `step`, `time` (seconds since the epoch),
        `metric` and `value`.
    """
    tables = [_tabulate(run, block) for run, block in blocks.items()]
    return pa.concat_tables([_METRICS.empty_table(), *tables]).unify_dictionaries()


def _tabulate(run: str, block: Block) -> Any:
    metrics, rows = np.nonzero(block.present.T)
    zeros = pa.array(np.zeros(len(rows), np.int32))
    names = pa.array([_as_utf8(name) for name in block.names], pa.string())
    columns = [
        pa.DictionaryArray.from_arrays(zeros, pa.array([_as_utf8(run)], pa.string())),
        pa.array(block.steps[rows]),
        pa.array(block.times[rows]),
        pa.DictionaryArray.from_arrays(pa.array(metrics.astype(np.int32)), names),
        pa.array(block.values[rows, metrics]),
    ]
    return pa.Table.from_arrays(columns, schema=_METRICS)


def build_event_table(events: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Builds a table with a row for each event.

    Args:
        events: the events of each run, by run name.

    Returns:
        A `pyarrow.Table` with the columns `run`, `kind`, `step`, `time` (seconds since the epoch)
        and `data`, which holds the event's other keys as JSON.
    """
    rows = [_event_row(run, event) for run, of_run in events.items() for event in of_run]
    return pa.Table.from_pylist(rows, schema=_EVENTS)


def _event_row(run: str, event: Mapping[str, Any]) -> dict[str, Any]:
    data = {k: v for k, v in event.items() if k not in ("kind", "step", "time")}
    step, time = event.get("step"), event.get("time")
    return {
        "run": _as_utf8(run),
        "kind": _as_utf8(str(event["kind"])),
        "step": step if isinstance(step, int) else None,
        "time": time if isinstance(time, int | float) else None,
        "data": json.dumps(data),
    }


def _as_utf8(text: str) -> str:
    """Replaces the characters that UTF-8 cannot encode, as in a file name of another encoding."""
    return text.encode("utf-8", "replace").decode()

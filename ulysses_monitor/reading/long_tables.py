"""Runs as Arrow tables with a row for each value or event, as databases like them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ulysses_monitor.store import Block

__all__ = ["event_table", "metric_table"]

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


def metric_table(blocks: Mapping[str, Block]) -> Any:
    """A row for each value that was measured, run by run and metric by metric.

    Args:
        blocks: by run.
    """
    tables = [_rows_of(run, block) for run, block in blocks.items()]
    return pa.concat_tables([_METRICS.empty_table(), *tables]).unify_dictionaries()


def _rows_of(run: str, block: Block) -> Any:
    metrics, rows = np.nonzero(block.present.T)
    zeros = pa.array(np.zeros(len(rows), np.int32))
    names = pa.array([_text(name) for name in block.names], pa.string())
    columns = [
        pa.DictionaryArray.from_arrays(zeros, pa.array([_text(run)], pa.string())),
        pa.array(block.steps[rows]),
        pa.array(block.times[rows]),
        pa.DictionaryArray.from_arrays(pa.array(metrics.astype(np.int32)), names),
        pa.array(block.values[rows, metrics]),
    ]
    return pa.Table.from_arrays(columns, schema=_METRICS)


def event_table(events: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """A row for each event; what it carries beyond kind, step and time is JSON in `data`.

    Args:
        events: by run.
    """
    rows = [_event_row(run, event) for run, of_run in events.items() for event in of_run]
    return pa.Table.from_pylist(rows, schema=_EVENTS)


def _event_row(run: str, event: Mapping[str, Any]) -> dict[str, Any]:
    data = {k: v for k, v in event.items() if k not in ("kind", "step", "time")}
    step, time = event.get("step"), event.get("time")
    return {
        "run": _text(run),
        "kind": _text(str(event["kind"])),
        "step": step if isinstance(step, int) else None,
        "time": time if isinstance(time, int | float) else None,
        "data": json.dumps(data),
    }


def _text(value: str) -> str:
    """`value` without what has no UTF-8 form, such as a file name of another encoding."""
    return value.encode("utf-8", "replace").decode()

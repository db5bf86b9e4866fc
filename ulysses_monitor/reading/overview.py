"""A run on one line: status, last step, loss, alerts, when it ran and for how long."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.store import Block

__all__ = ["Overview", "read_overview"]

_LARGEST = 2.0**63
_LOSS = "train/loss/total"
_EVERY_STEP = (_LOSS, "grad/norm/total", "train/step_seconds/total")


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A run in a few values; None where a value is unknown.

    Attributes:
        name: the name of the run's folder.
        status: ``running``, ``finished``, ``stopped``, ``failed``, ``crashed`` or ``unknown``.
        engine: the engine that trained it.
        world_size: the number of processes.
        step: the last recorded step.
        max_steps: the number of planned steps.
        loss: the last recorded loss; may be NaN or infinite.
        alerts: the number of alerts.
        started: the first start, in seconds since the epoch.
        ended: the end, in seconds since the epoch; for a crashed run, the last recorded step.
        seconds: the time from `started` to `ended`, pauses included; to now if it is running.
        place: path or URL.
        error: the exception that ended a failed run, in one line.
    """

    name: str
    status: str
    engine: str | None
    world_size: int | None
    step: int
    max_steps: int | None
    loss: float | None
    alerts: int
    started: float | None
    ended: float | None
    seconds: float | None
    place: str
    error: str | None = None


def read_overview(run: RunReader) -> Overview:
    """Reads a run's overview, and as little of the run as that takes.

    Raises:
        InputError: the run's description cannot be read.
    """
    info, block = run.info, run.block(*_EVERY_STEP, missing="ignore")
    if not len(block.steps):
        block = run.block()
    starts = info.get("starts")
    started = _as_number(starts[0]) if isinstance(starts, list) and starts else None
    ended = _find_end(info, block)
    return Overview(
        name=run.location.name,
        status=str(info["status"]),
        engine=None if info.get("engine") is None else str(info["engine"]),
        world_size=_as_integer(info.get("world_size")),
        step=int(block.steps[-1]) if len(block.steps) else _as_integer(info.get("step")) or 0,
        max_steps=_as_integer(info.get("max_steps")),
        loss=_last_value(block, _LOSS),
        alerts=len(run.event_list("alert")),
        started=started,
        ended=ended,
        seconds=_elapsed(started, time.time() if info["status"] == "running" else ended),
        place=str(run.location),
        error=None if info.get("error") is None else str(info["error"]),
    )


def _last_value(block: Block, name: str) -> float | None:
    if name not in block.names:
        return None
    column = block.names.index(name)
    rows = np.flatnonzero(block.present[:, column])
    return float(block.values[rows[-1], column]) if len(rows) else None


def _find_end(info: Mapping[str, Any], block: Block) -> float | None:
    if info["status"] == "running":
        return None
    ended = _as_number(info.get("ended"))
    if ended is None and len(block.times) and not np.isnan(block.times[-1]):
        return float(block.times[-1])
    return ended


def _elapsed(started: float | None, ended: float | None) -> float | None:
    return None if started is None or ended is None else max(0.0, ended - started)


def _as_number(value: object) -> float | None:
    """Returns `value` if it is a finite number: a run's description may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # also None for NaN


def _as_integer(value: object) -> int | None:
    number = _as_number(value)
    return int(number) if number is not None and number.is_integer() else None

"""A run in one line: state, last step, loss, alerts, when and how long."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.store import Block

__all__ = ["Overview", "overview"]

_LOSS = "train/loss/total"
_EACH_STEP = (_LOSS, "grad/norm/total", "train/step_seconds/total")


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A run in a few values; what is not known is None.

    Attributes:
        name: of its folder.
        status: ``running``, ``finished``, ``stopped``, ``failed``, ``crashed`` or ``unknown``.
        engine: what trained it.
        world_size: on how many processes.
        step: the last one.
        max_steps: how many were planned.
        loss: at the last step that has one; NaN where it was measured so.
        alerts: how many.
        started: the first time, in seconds since the epoch.
        ended: when it ended; when it was last heard of, if it crashed.
        seconds: from the first start until then, pauses and all; until now, if it is running.
        place: path or URL.
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


def overview(run: RunReader) -> Overview:
    """Reads as little of a run as it can."""
    info, block = run.info, run.block(*_EACH_STEP)
    if not len(block.steps):
        block = run.block()
    starts = info.get("starts")
    started = _number(starts[0]) if isinstance(starts, list) and starts else None
    ended = _ended(info, block)
    return Overview(
        name=run.location.name,
        status=str(info["status"]),
        engine=None if info.get("engine") is None else str(info["engine"]),
        world_size=_whole(info.get("world_size")),
        step=int(block.steps[-1]) if len(block.steps) else _whole(info.get("step")) or 0,
        max_steps=_whole(info.get("max_steps")),
        loss=_last(block, _LOSS),
        alerts=len(run.event_list("alert")),
        started=started,
        ended=ended,
        seconds=_seconds(started, time.time() if info["status"] == "running" else ended),
        place=str(run.location),
    )


def _last(block: Block, name: str) -> float | None:
    if name not in block.names:
        return None
    column = block.names.index(name)
    rows = np.flatnonzero(block.present[:, column])
    return float(block.values[rows[-1], column]) if len(rows) else None


def _ended(info: Mapping[str, Any], block: Block) -> float | None:
    if info["status"] == "running":
        return None
    known = _number(info.get("ended"))
    if known is None and len(block.times) and not np.isnan(block.times[-1]):
        return float(block.times[-1])
    return known


def _seconds(started: float | None, ended: float | None) -> float | None:
    return None if started is None or ended is None else max(0.0, ended - started)


def _number(value: object) -> float | None:
    """`value` where it is a number: a run's description may hold anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None

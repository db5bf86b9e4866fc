"""Reads trainer_state.json, in which every Hugging Face Trainer leaves its log."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.sources.base import MetricLog, build_block, read_json
from ulysses_monitor.records.trainer_names import assign_names, logged_name
from ulysses_monitor.store import Block, Location

__all__ = ["TrainerStateSource", "find_trainer_state"]

_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_trainer_state(folder: Location) -> Location | None:
    """Returns the folder's trainer_state.json, or that of its latest checkpoint."""
    if (folder / _FILE).is_file():
        return folder / _FILE
    found = [m for m in map(_CHECKPOINT.fullmatch, folder.children()) if m is not None]
    latest_first = sorted(found, key=lambda match: -int(match[1]))
    files = (folder / match[0] / _FILE for match in latest_first)
    return next((file for file in files if file.is_file()), None)


class TrainerStateSource:
    """Reads the log in a Trainer's state, which has no times and only the steps that were logged.

    Args:
        folder: the Trainer's ``output_dir``, or one of its checkpoints.
        file: the file to read; if None, the latest in `folder` at each call.
    """

    damaged: Mapping[str, str] = {}

    def __init__(self, folder: Location, file: Location | None = None) -> None:
        self.folder = folder
        self._file = file

    def info(self) -> dict[str, Any]:
        """See `Source.info`."""
        state = self._state()
        step, planned = state.get("global_step"), state.get("max_steps")
        done = isinstance(step, int) and isinstance(planned, int) and 0 < planned <= step
        return {
            "name": self.folder.name,
            "status": "finished" if done else "unknown",
            "format": _FILE,
            "step": step,
            "max_steps": planned,
            "config": {k: v for k, v in state.items() if isinstance(v, str | int | float)},
        }

    def names(self) -> tuple[str, ...]:
        """See `Source.names`."""
        return tuple(self._metrics())

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """See `Source.read`."""
        return build_block({name: log for name, log in self._metrics().items() if wanted(name)})

    def events(self) -> list[dict[str, Any]]:
        """See `Source.events`; there are none."""
        return []

    def _metrics(self) -> dict[str, MetricLog]:
        rows = [row for row in self._state().get("log_history") or [] if isinstance(row, dict)]
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        logged = dict.fromkeys(key for row in rows for key in row if key != "step")
        names = assign_names(logged, logged_name)
        metrics: dict[str, MetricLog] = {}
        for row in rows:
            for key, name in names.items():
                if key in row and (value := _as_number(row[key])) is not None:
                    metrics.setdefault(name, MetricLog()).add(row["step"], math.nan, value)
        return metrics

    def _state(self) -> dict[str, Any]:
        file = self._file or find_trainer_state(self.folder)
        if file is None:
            raise InputError(f"run {self.folder}: {_FILE} no longer exists")
        return read_json(file)


def _as_number(value: object) -> float | None:
    """Returns a number, also NaN and Inf written as text; None if `value` is something else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if not isinstance(value, str) or not math.isfinite(number) else None

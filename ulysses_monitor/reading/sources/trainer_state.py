"""What any Hugging Face Trainer leaves: trainer_state.json with its log."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.sources.base import Points, lay_out
from ulysses_monitor.reading.sources.directory import read_json
from ulysses_monitor.records.trainer_names import assign_names, logged_name
from ulysses_monitor.store import Block, Location

__all__ = ["TrainerStateSource", "find_trainer_state"]

FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_trainer_state(folder: Location) -> Location | None:
    """The folder's own trainer_state.json, else its latest checkpoint's."""
    if (folder / FILE).is_file():
        return folder / FILE
    found = [m for m in map(_CHECKPOINT.fullmatch, folder.children()) if m is not None]
    latest_first = sorted(found, key=lambda match: -int(match[1]))
    files = (folder / match[0] / FILE for match in latest_first)
    return next((file for file in files if file.is_file()), None)


class TrainerStateSource:
    """Reads the log of a Trainer's state. It holds no times, and no value between two logs.

    Args:
        folder: the Trainer's ``output_dir``, or one of its checkpoints.
        file: the file to read; the latest in `folder` at each call if None.
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
            "format": FILE,
            "step": step,
            "max_steps": planned,
            "config": {k: v for k, v in state.items() if isinstance(v, str | int | float)},
        }

    def names(self) -> tuple[str, ...]:
        """See `Source.names`."""
        return tuple(self._metrics())

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """See `Source.read`."""
        return lay_out({name: m for name, m in self._metrics().items() if wanted(name)})

    def events(self) -> list[dict[str, Any]]:
        """See `Source.events`; there are none."""
        return []

    def _metrics(self) -> dict[str, Points]:
        logs = [log for log in self._state().get("log_history") or [] if isinstance(log, dict)]
        logs = [log for log in logs if isinstance(log.get("step"), int)]
        logged = dict.fromkeys(key for log in logs for key in log if key != "step")
        names = assign_names(logged, logged_name)
        metrics: dict[str, Points] = {}
        for log in logs:
            for key, name in names.items():
                if key in log and (value := _as_number(log[key])) is not None:
                    metrics.setdefault(name, Points()).add(log["step"], math.nan, value)
        return metrics

    def _state(self) -> dict[str, Any]:
        file = self._file or find_trainer_state(self.folder)
        if file is None:
            raise InputError(f"run {self.folder}: {FILE} is gone")
        state = read_json(file)
        if not isinstance(state, dict):
            raise InputError(f"run {file}: cannot be read: it holds no JSON object")
        return state


def _as_number(value: object) -> float | None:
    """A number, also NaN and Inf where they were written as text; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if not isinstance(value, str) or not math.isfinite(number) else None

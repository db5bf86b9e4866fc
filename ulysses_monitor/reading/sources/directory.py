"""A run directory of this project: run.json, metrics/, events.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.store import Block, Location, MetricsReader, is_locked

__all__ = ["DirectorySource", "read_json"]


class DirectorySource:
    """Reads a run directory, finished or alive, here or at a URL.

    Args:
        folder: holds run.json.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._metrics = MetricsReader(folder / "metrics")

    @property
    def damaged(self) -> Mapping[str, str]:
        """See `Source.damaged`."""
        return {f"metrics/{name}": reason for name, reason in self._metrics.damaged.items()}

    def info(self) -> dict[str, Any]:
        """See `Source.info`; ``crashed`` is a run that nobody writes though it says it runs.

        Whether somebody writes a run at a URL cannot be known: there it says what run.json says.
        """
        found = read_json(self.folder / "run.json")
        if not isinstance(found, dict):
            raise InputError(f"run {self.folder}: run.json is damaged: it holds no JSON object")
        info = {"name": self.folder.name, "status": "unknown"} | found
        local = self.folder.local
        # A mirror has no lock file: whether its run is alive cannot be seen there.
        written_here = local is not None and (local / ".lock").exists()
        if info["status"] == "running" and local and written_here and not is_locked(local):
            info["status"] = "crashed"
        return info

    def names(self) -> tuple[str, ...]:
        """See `Source.names`."""
        return self._metrics.names()

    def read(self, wanted: Callable[[str], bool]) -> Block:
        """See `Source.read`."""
        return self._metrics.read(wanted)

    def events(self) -> list[dict[str, Any]]:
        """See `Source.events`."""
        try:
            # Bytes, and split at newlines only: a torn line may end within a character, and
            # messages may hold what Python else takes for the end of a line.
            lines = (self.folder / "events.jsonl").read().split(b"\n")
        except FileNotFoundError:
            return []
        return [event for event in map(_event, lines) if event is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    """The event on a line, None for the torn one that a killed run leaves."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return (
        {"step": 0, "time": None} | event if isinstance(event, dict) and "kind" in event else None
    )


def read_json(file: Location) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(file.read())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"run {file}: cannot be read: {reason}") from None

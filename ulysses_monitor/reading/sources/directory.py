"""A run directory of this project: run.json, metrics/, events.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ulysses_monitor.reading.sources.base import read_json
from ulysses_monitor.reading.sources.description import check_description, parse_event
from ulysses_monitor.store import Block, Location, MetricsReader, is_locked

__all__ = ["DirectorySource"]


class DirectorySource:
    """Reads a run directory, finished or live, local or at a URL.

    Args:
        folder: the folder with run.json.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._metrics = MetricsReader(folder / "metrics")
        self._found: dict[str, str] = {}

    @property
    def damaged(self) -> Mapping[str, str]:
        """See `Source.damaged`."""
        found = {f"metrics/{name}": reason for name, reason in self._metrics.damaged.items()}
        local = self.folder.local
        if local is not None and not (local / "metrics").is_dir():
            found["metrics"] = "the folder is missing"
        return found | self._found

    def _note(self, name: str, problem: str) -> None:
        """Keeps what the last read of a file found wrong with it, if anything."""
        self._found.pop(name, None)
        if problem:
            self._found[name] = problem

    def info(self) -> dict[str, Any]:
        """See `Source.info`.

        The status is ``crashed`` if run.json says ``running`` and no process writes the run. At a
        URL there is no way to tell, and the status is what run.json says.
        """
        content, problem = check_description(read_json(self.folder / "run.json"))
        self._note("run.json", problem)
        info = {"name": self.folder.name, "status": "unknown"} | content
        local = self.folder.local
        # A mirror has no lock file, so it cannot show whether its run is still being written.
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
            # Split the bytes, and at newlines only: a torn line may end inside a character, and
            # text may hold other characters at which Python splits lines.
            lines = (self.folder / "events.jsonl").read().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            self._note("events.jsonl", f"cannot be read: {error.strerror or error}")
            return []
        *whole, torn = lines  # a killed run leaves a torn last line, which is no damage
        events = [parse_event(line) for line in whole if line.strip()]
        bad = events.count(None)
        self._note("events.jsonl", f"lines that hold no event: {bad}" if bad else "")
        return [event for event in [*events, parse_event(torn)] if event is not None]

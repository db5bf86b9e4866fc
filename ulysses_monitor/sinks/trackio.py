"""Records metrics and alerts in Trackio's database on this machine; `trackio show` draws them.

`trackio.init` prints, ends the run of the user's own, asks Hugging Face who is logged in, and sends
everything to a Space if an environment variable names one. So the sink writes to the database as
Trackio's importers do, and touches no network.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ulysses_monitor.common.masking import mask_secrets, mask_text
from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates, to_jsonable
from ulysses_monitor.sinks.arguments import Patterns, require_library
from ulysses_monitor.sinks.selection import Selection

__all__ = ["TrackioSink"]

_LEVELS = {"info": "info", "warning": "warn", "critical": "error"}


class TrackioSink:
    """Starts a Trackio run for each start of a training, beside any Trackio run of the user's own.

    The database is in ``TRACKIO_DIR``, by default in Hugging Face's cache. Nothing is sent to a
    Space; ``trackio sync`` does that.

    Args:
        project: the Trackio project.
        run_name: name of the Trackio run; that of the run directory by default.
        metrics: patterns of the metrics to record; all but modules and parameters by default.

    Raises:
        InputError: an argument is wrong, or trackio is not installed.
    """

    name = "trackio"

    @checked_arguments("sink trackio")
    def __init__(
        self,
        project: Text = "ulysses",
        run_name: Text | None = None,
        metrics: Patterns | None = None,
    ) -> None:
        self._selection = Selection(metrics)
        require_library(self.name, "trackio")
        self._project, self._given_name = project, run_name
        self._run = {"run": run_name or "run", "run_id": uuid.uuid4().hex}
        self._config: dict[str, Any] | None = {}

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the name and the config of the run."""
        name = self._given_name or str(info.get("name") or run_dir.name)
        self._run = {"run": escape_surrogates(name), "run_id": uuid.uuid4().hex}
        config = to_jsonable(mask_secrets(dict(info.get("config") or {})))
        self._config = {escape_surrogates(key): value for key, value in config.items()}

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            OSError: the database is locked or the disk is full; the item can be written again.
        """
        with _database_errors_as_os_errors():
            if isinstance(item, StepRecord):
                self._write_record(item)
            elif item.kind == "alert":
                self._write_alert(item)

    def _write_record(self, record: StepRecord) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        created = {"_Created": _iso(record.time)}  # the key by which Trackio sorts runs
        SQLiteStorage.bulk_log(
            self._project,
            **self._run,
            metrics_list=[{escape_surrogates(n): v for n, v in self._selection.items(record)}],
            steps=[record.step],
            timestamps=[_iso(record.time)],
            config=None if self._config is None else {**self._config, **created},
        )
        self._config = None  # written

    def _write_alert(self, event: Event) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.bulk_alert(
            self._project,
            **self._run,
            titles=[escape_surrogates(str(event.data.get("rule")))],
            texts=[escape_surrogates(mask_text(str(event.data.get("message"))))],
            levels=[_LEVELS.get(str(event.data.get("severity")), "warn")],
            steps=[event.step],
            timestamps=[_iso(event.time)],
        )

    def flush(self) -> None:
        """Does nothing, because every item is written at once."""

    def close(self) -> None:
        """Does nothing, because nothing stays open."""


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


@contextmanager
def _database_errors_as_os_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"sink trackio: {error}") from error

"""Turns a run's parts into one file."""

from __future__ import annotations

import logging
from pathlib import Path

from ulysses_monitor.store import compacted
from ulysses_monitor.store.location import Location
from ulysses_monitor.store.names import COMPACTED
from ulysses_monitor.store.part import sync_directory
from ulysses_monitor.store.reading import MetricsReader, list_files

__all__ = ["compact", "is_small"]

logger = logging.getLogger(__name__)

_SMALL_BYTES = 256 << 20


def is_small(directory: Path) -> bool:
    """Whether compacting takes seconds only."""
    return sum(path.stat().st_size for path in directory.glob("*.arrow*")) <= _SMALL_BYTES


def compact(directory: Path) -> dict[str, str]:
    """Turns all files of ``metrics/`` into one Parquet file; safe to interrupt at any point.

    Nobody else may write the run. Damaged files stay where they are.

    Returns:
        Why each damaged file is damaged, by its name.

    Raises:
        OSError: there is no room; everything is as it was.
    """
    location = Location.of(directory)
    reader = MetricsReader(location)
    files, damaged = list_files(location), reader.verify()
    whole = [file for file in files if file.name not in damaged]
    parts = [file for file in whole if file.name != COMPACTED]
    if parts:
        compacted.write(directory, reader.names(), whole, reader.read_file)
        sync_directory(directory)
    # A reader that comes between these lines sees a step twice and serves it once.
    for file in parts:
        (directory / file.name).unlink()
    return damaged

"""Merges the parts of a run into one file."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from ulysses_monitor.common.files import sync_directory
from ulysses_monitor.store import compacted
from ulysses_monitor.store.location import Location
from ulysses_monitor.store.names import COMPACTED, MetricsFile
from ulysses_monitor.store.reading import MetricsReader, list_files

__all__ = ["compact", "is_small"]

_SMALL_BYTES, _FEW_METRICS = 256 << 20, 5000


def is_small(directory: Path) -> bool:
    """Returns whether compacting takes only seconds."""
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    return (
        size <= _SMALL_BYTES and len(MetricsReader(Location.of(directory)).names()) <= _FEW_METRICS
    )


def compact(directory: Path) -> dict[str, str]:
    """Merges the files of ``metrics/`` into one Parquet file; safe to interrupt at any point.

    Nobody else may write the run. A damaged file stays, and so do all files after it: the compacted
    file counts as the oldest, so newer values in it would be hidden by older ones.

    Returns:
        Why each damaged file is damaged, by file name.

    Raises:
        OSError: there is no room; nothing has changed.
    """
    location = Location.of(directory)
    reader = MetricsReader(location)
    damaged = reader.verify()
    intact = list(takewhile(lambda file: file.name not in damaged, list_files(location)))
    parts = [file for file in intact if file.name != COMPACTED]
    if parts:
        names = dict.fromkeys(name for file in intact for name in reader.read_names(file))
        compacted.write(directory, list(names), intact, reader.read_file)
        sync_directory(directory)
    # A reader between these two steps finds each step twice and serves it once.
    for file in parts:
        # The tail that became the part goes first: alone, it would count as newer.
        (directory / MetricsFile.tail(file.number).name).unlink(missing_ok=True)
        (directory / file.name).unlink(missing_ok=True)
    return damaged

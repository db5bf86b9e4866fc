"""Turns a run's parts into one file."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from ulysses_monitor.store import compacted
from ulysses_monitor.store.location import Location
from ulysses_monitor.store.names import COMPACTED, MetricsFile
from ulysses_monitor.store.part import sync_directory
from ulysses_monitor.store.reading import MetricsReader, list_files

__all__ = ["compact", "is_small"]

_SMALL_BYTES, _FEW_METRICS = 256 << 20, 5000


def is_small(directory: Path) -> bool:
    """Whether compacting takes seconds only."""
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    return (
        size <= _SMALL_BYTES and len(MetricsReader(Location.of(directory)).names()) <= _FEW_METRICS
    )


def compact(directory: Path) -> dict[str, str]:
    """Turns the files of ``metrics/`` into one Parquet file; safe to interrupt at any point.

    Nobody else may write the run. A damaged file stays where it is, and so do those after it: the
    compacted file is the oldest of all, and what it has must not be hidden behind older values.

    Returns:
        Why each damaged file is damaged, by its name.

    Raises:
        OSError: there is no room; everything is as it was.
    """
    location = Location.of(directory)
    reader = MetricsReader(location)
    damaged = reader.verify()
    whole = list(takewhile(lambda file: file.name not in damaged, list_files(location)))
    parts = [file for file in whole if file.name != COMPACTED]
    if parts:
        names = dict.fromkeys(name for file in whole for name in reader.read_names(file))
        compacted.write(directory, list(names), whole, reader.read_file)
        sync_directory(directory)
    # A reader that comes between these lines sees a step twice and serves it once.
    for file in parts:
        # A tail that was sealed goes first: alone, it would count as newer than its part.
        (directory / MetricsFile.tail(file.number).name).unlink(missing_ok=True)
        (directory / file.name).unlink(missing_ok=True)
    return damaged

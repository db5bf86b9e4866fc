"""The embedded run store: a run directory that any Arrow or Parquet reader can open."""

from ulysses_monitor.store.block import Block, merge
from ulysses_monitor.store.compaction import compact
from ulysses_monitor.store.directory import (
    IfExists,
    RunDirectory,
    check_available,
    check_writable,
    holds_run,
    is_locked,
)
from ulysses_monitor.store.location import Location
from ulysses_monitor.store.mirror import MirrorSink, check_mirror
from ulysses_monitor.store.reading import MetricsReader
from ulysses_monitor.store.rows_file import RowsFile, read_steps
from ulysses_monitor.store.sink import StoreSink

__all__ = [
    "Block",
    "IfExists",
    "Location",
    "MetricsReader",
    "MirrorSink",
    "RowsFile",
    "RunDirectory",
    "StoreSink",
    "check_available",
    "check_mirror",
    "check_writable",
    "compact",
    "holds_run",
    "is_locked",
    "merge",
    "read_steps",
]

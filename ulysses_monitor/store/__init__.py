"""The embedded run store: a run directory that any Arrow or Parquet reader can open."""

from ulysses_monitor.store.directory import IfExists, RunDirectory, check_free, is_locked
from ulysses_monitor.store.parts import Block, compact, merge, read_blocks
from ulysses_monitor.store.sink import StoreSink

__all__ = [
    "Block",
    "IfExists",
    "RunDirectory",
    "StoreSink",
    "check_free",
    "compact",
    "is_locked",
    "merge",
    "read_blocks",
]

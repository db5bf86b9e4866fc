"""Names of the files in ``metrics/``."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["COMPACTED", "MetricsFile"]

COMPACTED = "metrics.parquet"
"""Name of the compacted file, which counts as older than all others."""

_TAIL = re.compile(r"_tail-(\d+)\.arrows")
_PART = re.compile(r"part-(\d+)-([0-9a-f]{8})\.arrow")


@dataclass(frozen=True)
class MetricsFile:
    """One file of ``metrics/``.

    Attributes:
        name: the file name.
        number: its position among the files; a tail keeps it when it becomes a part.
        schema: CRC-32 of a part's metric names, in hexadecimal; None for other files.
    """

    name: str
    number: int
    schema: str | None = None

    @classmethod
    def parse(cls, name: str) -> MetricsFile | None:
        """Returns the file with a name, or None if the store does not use such names."""
        if name == COMPACTED:
            return cls(name, -1)
        if match := _TAIL.fullmatch(name):
            return cls(name, int(match[1]))
        if match := _PART.fullmatch(name):
            return cls(name, int(match[1]), match[2])
        return None

    @classmethod
    def tail(cls, number: int) -> MetricsFile:
        """Returns the tail with a number."""
        return cls(f"_tail-{number:05d}.arrows", number)

    @classmethod
    def part(cls, number: int, names: Sequence[str]) -> MetricsFile:
        """Returns the part with a number and metric names."""
        schema = f"{zlib.crc32(chr(10).join(names).encode()):08x}"
        return cls(f"part-{number:05d}-{schema}.arrow", number, schema)

    @property
    def is_tail(self) -> bool:
        """Whether the file may still grow."""
        return self.schema is None and self.name != COMPACTED

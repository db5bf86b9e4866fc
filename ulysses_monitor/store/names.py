"""Names of the files in ``metrics/``."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["COMPACTED", "MetricsFile"]

COMPACTED = "metrics.parquet"
"""The compacted file; older than every other."""

_TAIL = re.compile(r"_tail-(\d+)\.arrows")
_PART = re.compile(r"part-(\d+)-([0-9a-f]{8})\.arrow")


@dataclass(frozen=True)
class MetricsFile:
    """One file of ``metrics/``.

    Attributes:
        name: its name.
        number: its place among the others; a tail keeps it when it becomes a part.
        schema: CRC-32 of a part's metric names, in hexadecimal; None where it is no part.
    """

    name: str
    number: int
    schema: str | None = None

    @classmethod
    def parse(cls, name: str) -> MetricsFile | None:
        """The file of that name; None where it is none of the store's."""
        if name == COMPACTED:
            return cls(name, -1)
        if match := _TAIL.fullmatch(name):
            return cls(name, int(match[1]))
        if match := _PART.fullmatch(name):
            return cls(name, int(match[1]), match[2])
        return None

    @classmethod
    def tail(cls, number: int) -> MetricsFile:
        """The tail of that number."""
        return cls(f"_tail-{number:05d}.arrows", number)

    @classmethod
    def part(cls, number: int, names: Sequence[str]) -> MetricsFile:
        """The part of that number with those metrics."""
        schema = f"{zlib.crc32(chr(10).join(names).encode()):08x}"
        return cls(f"part-{number:05d}-{schema}.arrow", number, schema)

    @property
    def is_tail(self) -> bool:
        """Whether it may still grow."""
        return self.schema is None and self.name != COMPACTED

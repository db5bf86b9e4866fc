"""The one file that a run's parts become at its end: Parquet, a row a step, a column a metric.

One row group, whatever the number of steps, so that its footer stays small and a metric is one
short read. Pages carry checksums.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ulysses_monitor.store.block import Block, DamagedError, merge, overlay_column
from ulysses_monitor.store.names import COMPACTED, MetricsFile

__all__ = ["ReadFile", "read", "read_names", "write"]

_FIXED = ("step", "time")
_SUMS = b"ulysses.crc32"
"""CRC-32 of the metrics' names and of each column: pages carry their own, the footer does not."""
_CHUNK_BYTES = 64 << 20
"""Values that are merged at a time."""

_GROUP_ROWS = 1 << 20


def read_names(file: Any) -> tuple[str, ...]:
    """Metric names of the file.

    Raises:
        ValueError: it is damaged.
    """
    return _opened(file)[1]


def _opened(file: Any) -> tuple[Any, tuple[str, ...], npt.NDArray[np.uint32]]:
    """The file, its metrics' names, and the checksums of its columns."""
    try:
        opened = pq.ParquetFile(file, page_checksum_verification=True)
        sums = np.frombuffer(bytes.fromhex(opened.schema_arrow.metadata[_SUMS].decode()), "<u4")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    names = tuple(opened.schema_arrow.names[len(_FIXED) :])
    if not len(sums) or _sum_of_names(names) != sums[0]:
        raise ValueError("the names of its metrics are damaged")
    return opened, names, sums[1:]


def _sum_of_names(names: Sequence[str]) -> int:
    return zlib.crc32("\n".join(names).encode())


def _sum(values: npt.NDArray[Any], present: npt.NDArray[np.bool_] | None = None) -> int:
    """CRC-32 of a column as it is served."""
    crc = zlib.crc32(np.ascontiguousarray(values).data)
    return crc if present is None else zlib.crc32(np.packbits(present).data, crc)


def read(file: Any, places: Callable[[tuple[str, ...]], Sequence[int]]) -> Block:
    """Every step, with the metrics that are wanted, by their places among all.

    Raises:
        ValueError: the file is damaged.
    """
    opened, own, sums = _opened(file)
    return _read(opened, own, sums, places(own))


def _read(
    opened: Any, own: tuple[str, ...], sums: npt.NDArray[np.uint32], chosen: Sequence[int]
) -> Block:
    """All at once, or, where something is damaged, column by column.

    Raises:
        ValueError: the steps are damaged.
        DamagedError: other columns are; it has the others.
    """
    try:
        return _columns(opened, own, sums, chosen)
    except ValueError:
        blocks = [_columns(opened, own, sums, [])]
    lost = []
    for i in chosen:
        try:
            blocks.append(_columns(opened, own, sums, [i]))
        except ValueError:
            lost.append(own[i])
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    raise DamagedError(f"the checksum of {lost[0]}{more} does not fit", merge(blocks))


def _columns(
    opened: Any, own: tuple[str, ...], sums: npt.NDArray[np.uint32], chosen: Sequence[int]
) -> Block:
    try:
        table = opened.read(columns=[*_FIXED, *(own[i] for i in chosen)], use_threads=False)
        steps, times = table[0].to_numpy(), table[1].to_numpy()
        values = np.empty((len(chosen), table.num_rows), np.float32)
        present = np.empty(values.shape, bool)
        for at, column in enumerate(table.columns[len(_FIXED) :]):
            values[at], present[at] = column.to_numpy(), column.is_valid().to_numpy()
    except (pa.ArrowException, OSError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    found = [_sum(steps), _sum(times), *map(_sum, values, present)]
    if not np.array_equal(found, sums[[0, 1, *(i + 2 for i in chosen)]]):
        raise ValueError("the checksum of a column does not fit")
    return Block(tuple(own[i] for i in chosen), steps, times, values.T, present.T)


def verify(file: Any) -> None:
    """Reads everything, some columns at a time.

    Raises:
        ValueError: the file is damaged.
    """
    opened, own, sums = _opened(file)
    columns = max(1, _CHUNK_BYTES // (8 * max(1, opened.metadata.num_rows)))
    for first in range(0, max(1, len(own)), columns):
        _read(opened, own, sums, range(first, min(first + columns, len(own))))


ReadFile = Callable[[MetricsFile, Callable[[str], bool]], Block]


def write(
    directory: Path, names: Sequence[str], files: Sequence[MetricsFile], read: ReadFile
) -> None:
    """Writes the file, in memory that does not grow with the run; safe to interrupt.

    Args:
        directory: the folder ``metrics``.
        names: of all metrics.
        files: its files, oldest first.
        read: reads a file's steps with the metrics whose name is wanted.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    merged = merge([read(file, lambda _: False) for file in files])
    temporary = directory / f".{COMPACTED}.tmp"
    try:
        with TemporaryFile(dir=directory) as one, TemporaryFile(dir=directory) as other:
            shape = len(names), len(merged.steps)
            values = np.memmap(one, np.float32, shape=shape)
            present = np.memmap(other, np.bool_, shape=shape)
            for file in files:
                _fill(values, present, merged.steps, names, lambda wanted, f=file: read(f, wanted))
            _write_table(_table(merged, names, values, present), temporary)
        temporary.replace(directory / COMPACTED)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(values: Any, present: Any, steps: Any, names: Sequence[str], read: Any) -> None:
    """Lays one file over what is there, some columns at a time."""
    chunk = max(1, _CHUNK_BYTES // (4 * max(1, len(steps))))
    for first in range(0, len(names), chunk):
        places = {name: first + i for i, name in enumerate(names[first : first + chunk])}
        block = read(places.__contains__)
        rows = np.searchsorted(steps, block.steps)
        for own, name in enumerate(block.names):
            overlay_column(values[places[name]], present[places[name]], rows, block, own)


def _table(merged: Block, names: Sequence[str], values: Any, present: Any) -> Any:
    """A table over what lies on disk, with the checksum of each column."""
    columns = {"step": pa.array(merged.steps), "time": pa.array(merged.times)}
    sums = [_sum_of_names(names), _sum(merged.steps), _sum(merged.times)]
    for name, column, has in zip(names, values, present, strict=True):
        bits = None
        if not has.all():
            column[~has] = np.nan
            bits = pa.py_buffer(np.packbits(has, bitorder="little"))
        sums.append(_sum(column, has))
        columns[name] = pa.Array.from_buffers(
            pa.float32(), len(column), [bits, pa.py_buffer(column)]
        )
    return pa.table(columns).replace_schema_metadata({_SUMS: np.array(sums, "<u4").tobytes().hex()})


def _write_table(table: Any, path: Path) -> None:
    pq.write_table(
        table,
        path,
        row_group_size=_GROUP_ROWS,
        compression="zstd",
        use_dictionary=False,  # floats seldom repeat, and a dictionary is a second read
        write_statistics=list(_FIXED),
        write_page_checksum=True,
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())

"""The compacted file: all parts of a finished run in one Parquet file.

It has one row per step and one column per metric. It has one row group whatever the number of
steps, so that its footer stays small and reading a metric is one short read. Pages have checksums.

Legend: N steps, M metrics.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ulysses_monitor.common.files import replace_file
from ulysses_monitor.store.arrays import to_arrow
from ulysses_monitor.store.block import Block, DamagedError, merge, overlay_column
from ulysses_monitor.store.names import COMPACTED, MetricsFile

__all__ = ["ReadFile", "read", "read_names", "write"]

_FIXED = ("step", "time")
_CHECKSUMS = b"ulysses.crc32"
"""Key of the CRC-32 of the metric names and of each column; Parquet only checks pages."""
_CHUNK_BYTES = 64 << 20
"""Bytes of values that are merged at a time."""

_GROUP_ROWS = 1 << 20


def read_names(file: Any) -> tuple[str, ...]:
    """Returns the metric names of the file.

    Raises:
        ValueError: the file is damaged.
    """
    return _open_parquet(file)[1]


def _open_parquet(file: Any) -> tuple[Any, tuple[str, ...], npt.NDArray[np.uint32]]:
    """Returns the open file, its metric names [M], and the checksums of its columns [M + 2]."""
    try:
        opened = pq.ParquetFile(file, page_checksum_verification=True)
        sums = np.frombuffer(
            bytes.fromhex(opened.schema_arrow.metadata[_CHECKSUMS].decode()), "<u4"
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    names = tuple(opened.schema_arrow.names[len(_FIXED) :])
    if not len(sums) or _names_checksum(names) != sums[0]:
        raise ValueError("its metric names are damaged")
    return opened, names, sums[1:]


def _names_checksum(names: Sequence[str]) -> int:
    return zlib.crc32("\n".join(names).encode())


def _checksum(values: npt.NDArray[Any], present: npt.NDArray[np.bool_] | None = None) -> int:
    """Returns the CRC-32 of a column's values and presence."""
    crc = zlib.crc32(np.ascontiguousarray(values).data)
    return crc if present is None else zlib.crc32(np.packbits(present).data, crc)


def read(file: Any, places: Callable[[tuple[str, ...]], Sequence[int]]) -> Block:
    """Reads every step with some of the metrics.

    Args:
        file: the open file.
        places: returns the positions of the wanted metrics among all.

    Raises:
        ValueError: the file is damaged.
    """
    opened, own, sums = _open_parquet(file)
    return _read(opened, own, sums, places(own))


def _read(
    opened: Any, own: tuple[str, ...], sums: npt.NDArray[np.uint32], chosen: Sequence[int]
) -> Block:
    """Reads all columns at once or, if one is damaged, column by column.

    Raises:
        ValueError: the steps are damaged.
        DamagedError: metrics are damaged; the error has the others.
    """
    try:
        return _read_columns(opened, own, sums, chosen)
    except ValueError:
        blocks = [_read_columns(opened, own, sums, [])]
    lost = []
    for i in chosen:
        try:
            blocks.append(_read_columns(opened, own, sums, [i]))
        except ValueError:
            lost.append(own[i])
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    raise DamagedError(f"the checksum of {lost[0]}{more} does not match", merge(blocks))


def _read_columns(
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
    found = [_checksum(steps), _checksum(times), *map(_checksum, values, present)]
    if not np.array_equal(found, sums[[0, 1, *(i + 2 for i in chosen)]]):
        raise ValueError("the checksum of a column does not match")
    # [M, N] -> [N, M]
    return Block(tuple(own[i] for i in chosen), steps, times, values.T, present.T)


def verify(file: Any) -> None:
    """Reads the whole file, some columns at a time.

    Raises:
        ValueError: the file is damaged.
    """
    opened, own, sums = _open_parquet(file)
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
        names: names of all metrics [M].
        files: the files to merge, oldest first.
        read: reads the steps of a file with the metrics whose names a function accepts.

    Raises:
        OSError: it cannot be written; the old file stays as it was.
    """
    merged = merge([read(file, lambda _: False) for file in files])
    with TemporaryFile(dir=directory) as one, TemporaryFile(dir=directory) as other:
        shape = len(names), len(merged.steps)
        values = np.memmap(one, np.float32, shape=shape)
        present = np.memmap(other, np.bool_, shape=shape)
        for source in files:
            _fill(values, present, merged.steps, names, lambda wanted, f=source: read(f, wanted))
        with replace_file(directory / COMPACTED) as file:
            _write_table(_table(merged, names, values, present), file)


def _fill(values: Any, present: Any, steps: Any, names: Sequence[str], read: Any) -> None:
    """Overlays values and presence [M, N] with those of one file, some columns at a time."""
    chunk = max(1, _CHUNK_BYTES // (4 * max(1, len(steps))))
    for first in range(0, len(names), chunk):
        places = {name: first + i for i, name in enumerate(names[first : first + chunk])}
        block = read(places.__contains__)
        rows = np.searchsorted(steps, block.steps)
        for own, name in enumerate(block.names):
            overlay_column(values[places[name]], present[places[name]], rows, block, own)


def _table(merged: Block, names: Sequence[str], values: Any, present: Any) -> Any:
    """Returns a table over values and presence [M, N] on disk, with a checksum of each column."""
    columns = {"step": to_arrow(merged.steps), "time": to_arrow(merged.times)}
    sums = [_names_checksum(names), _checksum(merged.steps), _checksum(merged.times)]
    for name, column, has in zip(names, values, present, strict=True):
        bits = None
        if not has.all():
            column[~has] = np.nan
            bits = pa.py_buffer(np.packbits(has, bitorder="little"))
        sums.append(_checksum(column, has))
        columns[name] = pa.Array.from_buffers(
            pa.float32(), len(column), [bits, pa.py_buffer(column)]
        )
    return pa.table(columns).replace_schema_metadata(
        {_CHECKSUMS: np.array(sums, "<u4").tobytes().hex()}
    )


def _write_table(table: Any, file: IO[bytes]) -> None:
    pq.write_table(
        table,
        file,
        row_group_size=_GROUP_ROWS,
        compression="zstd",
        use_dictionary=False,  # floats seldom repeat, and a dictionary would need a second read
        write_statistics=list(_FIXED),
        write_page_checksum=True,
    )

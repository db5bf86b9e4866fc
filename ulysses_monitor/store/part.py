"""Parts: sealed steps of one schema, with one column per metric.

A part is an Arrow IPC file (``part-00000-89abcdef.arrow``) with one batch: ``step`` int64, ``time``
float64 and a float32 column for each metric, so that reading one metric is one short read. The
batch's metadata has the CRC-32 of each column. The file name ends in the CRC-32 of the metric
names, so a reader reads them only once for all parts that share them.

Legend: N steps, M metrics.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ulysses_monitor.common.files import replace_file, sync_directory
from ulysses_monitor.store.arrays import to_arrow
from ulysses_monitor.store.block import Block, DamagedError
from ulysses_monitor.store.names import MetricsFile

__all__ = ["PartLayout", "read_names", "read_part", "write_part"]

_SUMS, _SUM = b"crc32", np.dtype("<u4")


def write_part(directory: Path, number: int, block: Block) -> Path:
    """Writes a part, which is safe on disk when this returns.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    # [N, M] -> [M, N]: each column is contiguous
    values = np.ascontiguousarray(block.values.T)
    path = directory / MetricsFile.part(number, block.names).name
    with (
        replace_file(path) as file,
        pa.ipc.new_file(pa.PythonFile(file, "w"), _schema(block.names)) as writer,
    ):
        writer.write_batch(*_batch(block, values))
    sync_directory(directory)
    return path


def _schema(names: Sequence[str]) -> Any:
    fixed = [("step", pa.int64()), ("time", pa.float64())]
    return pa.schema([*fixed, *((name, pa.float32()) for name in names)])


def _batch(block: Block, values: npt.NDArray[np.float32]) -> tuple[Any, dict[bytes, bytes]]:
    rows, size = len(block.steps), values.itemsize * len(block.steps)
    buffer = pa.py_buffer(values)
    columns = [to_arrow(block.steps), to_arrow(block.times)]
    for i in range(len(values)):  # pa.array would take 50 times as long
        own = [None, buffer.slice(i * size, size)]
        columns.append(pa.Array.from_buffers(pa.float32(), rows, own))
    sums = np.array([zlib.crc32(c) for c in (block.steps, block.times, *values)], _SUM)
    return pa.RecordBatch.from_arrays(columns, schema=_schema(block.names)), {_SUMS: sums.tobytes()}


# -- reading ----------------------------------------------------------------------------------


def read_names(content: Any, file: MetricsFile) -> tuple[str, ...]:
    """Returns the metric names of the part `file` [M].

    Raises:
        ValueError: the part is damaged.
    """
    try:
        names = tuple(pa.ipc.open_file(content).schema.names[2:])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    if MetricsFile.part(file.number, names) != file:
        raise ValueError("its metric names are damaged")
    return names


def read_part(content: Any, names: Sequence[str], chosen: Sequence[int]) -> Block:
    """Reads some columns of a part.

    Args:
        content: the open file.
        names: names of all its metrics [M].
        chosen: positions in `names`, ascending.

    Raises:
        ValueError: the steps or the file are damaged.
        DamagedError: metrics are damaged; the error has the others.
    """
    try:
        options = pa.ipc.IpcReadOptions(
            included_fields=[0, 1, *(i + 2 for i in chosen)], use_threads=False
        )
        reader = pa.ipc.open_file(content, options=options)
        batch, metadata = reader.get_batch_with_custom_metadata(0)
        # Reads the buffers directly: a damaged null count must not lead to a null bitmap.
        columns = [batch.column(i).buffers()[1] for i in range(batch.num_columns)]
        sums = np.frombuffer(metadata[_SUMS], _SUM)
        return _block(
            columns, batch.num_rows, sums[[0, 1, *(i + 2 for i in chosen)]], names, chosen
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _block(
    columns: Sequence[Any],
    rows: int,
    sums: npt.NDArray[np.uint32],
    names: Sequence[str],
    chosen: Sequence[int],
) -> Block:
    """Returns a block from the bytes of its columns, after checking their checksums.

    Raises:
        ValueError: the steps are damaged.
        DamagedError: metrics are damaged; the error has the others.
    """
    types = [np.int64, np.float64, *[np.float32] * len(chosen)]
    found = [np.frombuffer(c, t, rows) for c, t in zip(columns, types, strict=True)]
    good = [zlib.crc32(c.data) == expected for c, expected in zip(found, sums, strict=True)]
    if not (good[0] and good[1]):
        raise ValueError("the checksum of its steps does not match")
    values = np.empty((sum(good) - 2, rows), np.float32)
    kept = [
        (column, i) for column, i, fits in zip(found[2:], chosen, good[2:], strict=True) if fits
    ]
    for at, (column, _) in enumerate(kept):
        values[at] = column
    own = tuple(names[i] for _, i in kept)
    block = Block(own, found[0].copy(), found[1].copy(), values.T)  # [M, N] -> [N, M]
    if not all(good):
        lost = [names[i] for i, fits in zip(chosen, good[2:], strict=True) if not fits]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DamagedError(f"the checksum of {lost[0]}{more} does not match", block)
    return block


@dataclass(frozen=True)
class PartLayout:
    """Byte offsets of the columns, which all parts of the same schema and size share.

    A part's own description names every column, so reading it takes longer than reading one
    column. Data that is read through a layout counts only if its checksums match.

    Attributes:
        rows: number of steps in the part.
        columns: offsets of step, time and the metrics [M + 2].
        sums: offset of the checksums.
    """

    rows: int
    columns: npt.NDArray[np.int64]
    sums: int

    @classmethod
    def of(cls, content: Any) -> PartLayout:
        """Returns the layout of a part that is in memory or mapped into it.

        Raises:
            ValueError: the part is damaged.
        """
        try:
            batch, metadata = pa.ipc.open_file(content).get_batch_with_custom_metadata(0)
            sums = metadata[_SUMS]
            content.seek(0)
            buffer = content.read_buffer()
            buffers = [batch.column(i).buffers()[1] for i in range(batch.num_columns)]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        columns = np.array([b.address - buffer.address for b in buffers], np.int64)
        at = bytes(memoryview(buffer)[: columns[0]]).find(sums)
        return cls(batch.num_rows, columns, at)

    def read(self, content: Any, names: Sequence[str], chosen: Sequence[int]) -> Block:
        """Reads some columns, as `read_part` does.

        Raises:
            ValueError: a checksum does not match.
        """
        content.seek(0)
        data = memoryview(content.read_buffer())
        sums = np.frombuffer(data, _SUM, len(self.columns), self.sums)
        places = [0, 1, *(i + 2 for i in chosen)]
        sizes = [8, 8, *[4] * len(chosen)]
        starts = self.columns[places]
        columns = [data[a : a + self.rows * n] for a, n in zip(starts, sizes, strict=True)]
        return _block(columns, self.rows, sums[places], names, chosen)

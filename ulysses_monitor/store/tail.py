"""Tails: the newest steps of one schema, one row per step, safe on disk once flushed.

A tail is an Arrow IPC stream (``_tail-00000.arrows``) with the columns ``step`` int64, ``time``
float64, ``values``, a list of float32 whose names are in the stream's metadata, and ``crc32`` of
these three. A stream needs no footer, so every complete batch can be read, whatever happened to
the writer.

Legend: N steps, M metrics.
"""

from __future__ import annotations

import json
import operator
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.store.appending import AppendFile
from ulysses_monitor.store.arrays import to_arrow
from ulysses_monitor.store.block import Block
from ulysses_monitor.store.names import MetricsFile

__all__ = ["Tail", "read_tail", "read_tail_names"]

_NAMES, _SUM = b"ulysses.metrics", b"ulysses.crc32"
_MESSAGE = b"\xff\xff\xff\xff"
"""The first bytes of every message in an Arrow IPC stream."""

_BATCH_BYTES = 1 << 20

_Steps = npt.NDArray[np.int64]
_Times = npt.NDArray[np.float64]
_Values = npt.NDArray[np.float32]
_Rows = tuple[_Steps, _Times, _Values]


class Tail:
    """Appends records of one schema.

    Attributes:
        path: the file.
        number: its position among the run's files.
        schema: the schema of its records.
        rows: number of records so far.
    """

    def __init__(self, directory: Path, number: int, schema: Schema) -> None:
        width = len(schema.names)
        self.path = directory / MetricsFile.tail(number).name
        self.number, self.schema, self.rows = number, schema, 0
        self._limit = max(1, _BATCH_BYTES // (4 * width + 16))
        self._waiting: list[StepRecord] = []
        self._arrow = pa.schema(
            [
                ("step", pa.int64()),
                ("time", pa.float64()),
                ("crc32", pa.uint32()),
                ("values", pa.list_(pa.float32(), width)),
            ],
            metadata=_metadata(schema.names),
        )
        self._file = AppendFile(self.path)
        self._stream = pa.ipc.new_stream(pa.PythonFile(_PyarrowFile(self._file), "w"), self._arrow)

    def write(self, record: StepRecord) -> None:
        """Appends one step.

        Raises:
            ValueError: the record does not fit its schema, or its step is not an integer.
        """
        self._waiting.append(_check_record(record))
        self.rows += 1
        if len(self._waiting) >= self._limit:
            self._encode()

    def _encode(self) -> None:
        if not self._waiting:
            return
        steps = np.array([record.step for record in self._waiting], np.int64)
        times = np.array([record.time for record in self._waiting], np.float64)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            values = np.array([record.values for record in self._waiting], np.float32)
        lists = pa.FixedSizeListArray.from_arrays(
            to_arrow(values.reshape(-1)), type=self._arrow.field(3).type
        )
        sums = _row_checksums(steps, times, values)
        columns = [to_arrow(steps), to_arrow(times), to_arrow(sums), lists]
        self._stream.write_batch(pa.record_batch(columns, schema=self._arrow))
        self._waiting.clear()

    def flush(self) -> None:
        """Hands all records to the operating system, so that killing the process loses none.

        Raises:
            OSError: the records could not be written; they are kept for the next call.
        """
        self._encode()
        self._file.flush()

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self._encode()
        self._file.close()


def _check_record(record: StepRecord) -> StepRecord:
    """Returns the record if it can be encoded, so that a bad one cannot spoil its batch."""
    values = np.asarray(record.values, np.float64)
    width = len(record.schema.names)
    if values.shape != (width,) or not width:
        raise ValueError(f"the record has values of shape {values.shape}; expected ({width},)")
    step = np.int64(operator.index(record.step))
    return StepRecord(int(step), float(record.time), record.schema, values)


class _PyarrowFile:
    """An `AppendFile` as the Python file that pyarrow needs."""

    closed = False

    def __init__(self, file: AppendFile) -> None:
        self._file, self._size = file, 0

    def write(self, data: Any) -> int:
        count = self._file.write(memoryview(data))
        self._size += count
        return count

    def tell(self) -> int:
        return self._size

    def flush(self) -> None: ...

    def close(self) -> None: ...


# -- reading ----------------------------------------------------------------------------------


def read_tail_names(data: bytes) -> tuple[str, ...]:
    """Returns the metric names of a tail's content [M]; none if it is still empty.

    Raises:
        ValueError: its header is damaged.
    """
    return _read_header(data)[1]


def read_tail(data: bytes) -> tuple[Block, bool]:
    """Reads all complete steps of a tail's content.

    Returns:
        The steps, and whether some are missing because of damage. A damaged length of the last
        batch looks the same as an incomplete write, which does not count as damage.

    Raises:
        ValueError: the header is damaged, so that nothing can be read.
    """
    schema, names, at = _read_header(data)
    if schema is None:
        return Block.empty(), False
    batches, damaged = _read_batches(memoryview(data), at, schema)
    return _concatenate(names, batches), damaged


def _read_header(data: bytes) -> tuple[Any, tuple[str, ...], int]:
    """Returns Arrow schema, metric names and offset of the batches; no schema if it is empty."""
    if not any(data):
        return None, (), 0
    stream = pa.BufferReader(data)
    try:
        schema = pa.ipc.read_schema(_expect_type("schema", pa.ipc.read_message(stream)))
        names = tuple(json.loads(schema.metadata[_NAMES]))
    except (pa.ArrowException, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header cannot be read: {error}") from None
    if schema.metadata != _metadata(names):
        raise ValueError("its metric names are damaged")
    return schema, names, stream.tell()


def _expect_type(kind: str, message: Any) -> Any:
    """Checks the type, because pyarrow may crash the process on a message of another type."""
    if message.type != kind:
        raise ValueError(f"a message is a {message.type}; expected a {kind}")
    return message


def _metadata(names: tuple[str, ...]) -> dict[bytes, bytes]:
    text = json.dumps(names).encode()
    return {_NAMES: text, _SUM: str(zlib.crc32(text)).encode()}


def _read_batches(data: memoryview, at: int, schema: Any) -> tuple[list[_Rows], bool]:
    """Returns the complete batches, and whether one before the end is damaged."""
    batches: list[_Rows] = []
    torn = damaged = False
    while (found := _next_message(data, at)) < len(data):
        at, torn = found, torn or found != at
        stream = pa.BufferReader(data[at:])
        try:
            message = pa.ipc.read_message(stream)
        except (pa.ArrowException, OSError, EOFError):
            at, torn = at + 8, True  # this is an incomplete end, unless another message follows
            continue
        try:
            batch = pa.ipc.read_record_batch(_expect_type("record batch", message), schema)
            rows, is_complete = _verify_rows(batch)
        except (pa.ArrowException, OSError, ValueError):
            at, damaged = at + 8, True
            continue
        batches.append(rows)
        at, damaged, torn = at + stream.tell(), damaged or torn or not is_complete, False
    return batches, damaged


def _next_message(data: memoryview, at: int) -> int:
    """Returns where the next message may begin; messages are aligned to 8 bytes."""
    while at < len(data) and data[at : at + 4] != _MESSAGE:
        at += 8
    return at


def _verify_rows(batch: Any) -> tuple[_Rows, bool]:
    """Returns the rows whose checksums match, and whether those are all rows."""
    count, width = batch.num_rows, batch.schema.field(3).type.list_size
    steps = np.frombuffer(batch.column(0).buffers()[1], np.int64, count)
    times = np.frombuffer(batch.column(1).buffers()[1], np.float64, count)
    sums = np.frombuffer(batch.column(2).buffers()[1], np.uint32, count)
    flat = np.frombuffer(batch.column(3).values.buffers()[1], np.float32, count * width)
    values = flat.reshape(count, width)  # [N * M] -> [N, M]
    good = _row_checksums(steps, times, values) == sums
    return (steps[good], times[good], values[good]), bool(good.all())


def _row_checksums(steps: _Steps, times: _Times, values: _Values) -> npt.NDArray[np.uint32]:
    """Returns the CRC-32 of step, time and values of each row [N]."""
    rows = zip(steps, times, values, strict=True)
    return np.array([zlib.crc32(v, zlib.crc32(t, zlib.crc32(s))) for s, t, v in rows], np.uint32)


def _concatenate(names: tuple[str, ...], batches: list[_Rows]) -> Block:
    if not batches:
        return Block.empty(names)
    steps, times, values = (np.concatenate(column) for column in zip(*batches, strict=True))
    return Block(names, steps, times, values)

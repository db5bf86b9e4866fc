"""The columnar files under ``metrics/``.

While a run is alive each schema has an Arrow IPC stream (``part-00000.arrows``) that grows by one
record batch a step: ``step`` int64, ``time`` float64 and ``values``, a list of float32 whose names
stand in the stream's metadata. A stream needs no footer, so a reader sees every step that was
written, whatever happened to the writer. At the end of a run the parts become one Parquet file
with a column per metric.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ulysses_monitor.records import Schema, StepRecord

__all__ = ["Block", "PartWriter", "compact", "merge", "next_part", "read_blocks"]

_NAMES = b"ulysses.metrics"
_COMPACT = "metrics.parquet"


@dataclass(frozen=True)
class Block:
    """Rows of one file for the names that were asked for.

    Attributes:
        names: metric names [M].
        steps: int64 [N].
        times: seconds since the epoch, float64 [N].
        values: float32 [N, M]; NaN where a step has no such metric.
        present: whether a step has the metric, bool [N, M]: a NaN can also have been measured.
    """

    names: tuple[str, ...]
    steps: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    values: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_]


class PartWriter:
    """Appends records of one schema to one Arrow IPC stream."""

    def __init__(self, path: Path, schema: Schema) -> None:
        width = len(schema.names)
        self._schema = pa.schema(
            [
                ("step", pa.int64()),
                ("time", pa.float64()),
                ("values", pa.list_(pa.float32(), width)),
            ],
            metadata={_NAMES: json.dumps(schema.names).encode()},
        )
        self._width = width
        self._file = path.open("xb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def write(self, record: StepRecord) -> None:
        """Appends one step."""
        values = pa.array(record.values.astype(np.float32), pa.float32())
        columns = [
            pa.array([record.step], pa.int64()),
            pa.array([record.time], pa.float64()),
            pa.FixedSizeListArray.from_arrays(values, self._width),
        ]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))

    def flush(self) -> None:
        """Hands what was written to the operating system, where a killed process cannot lose it."""
        self._file.flush()

    def close(self) -> None:
        """Ends the stream."""
        self._stream.close()
        self._file.close()


def next_part(directory: Path) -> Path:
    """A path for a new part, after all that exist."""
    numbers = [int(p.stem.split("-")[1]) for p in directory.glob("part-*.arrows")]
    return directory / f"part-{max(numbers, default=-1) + 1:05d}.arrows"


def read_blocks(directory: Path, wanted: Callable[[str], bool]) -> list[Block]:
    """Reads the columns whose name is `wanted` from every file, oldest first.

    A part whose end is torn (the writer was killed, or is writing) is served up to its last whole
    step.
    """
    while True:
        try:
            return _read_files(directory, wanted)
        except FileNotFoundError:
            continue  # the run ended and compacted its parts between listing and reading them


def _read_files(directory: Path, wanted: Callable[[str], bool]) -> list[Block]:
    parts = sorted(directory.glob("part-*.arrows"))  # before the file that they are compacted to
    compacted = directory / _COMPACT
    blocks = [_read_compacted(compacted, wanted)] if compacted.exists() else []
    return blocks + [b for b in (_read_part(path, wanted) for path in parts) if b is not None]


def _read_part(path: Path, wanted: Callable[[str], bool]) -> Block | None:
    batches: list[Any] = []
    names: list[str] = []
    with path.open("rb") as file:
        try:
            stream = pa.ipc.open_stream(file)
            names = json.loads(stream.schema.metadata[_NAMES])
            batches.extend(stream)
        except (pa.ArrowInvalid, OSError):
            pass  # the torn end of a part that is being written, or whose writer was killed
    if not batches:
        return None
    chosen = [i for i, name in enumerate(names) if wanted(name)]
    table = pa.Table.from_batches(batches)
    flat = table["values"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    values = flat.reshape(table.num_rows, len(names))[:, chosen]
    return Block(
        names=tuple(names[i] for i in chosen),
        steps=table["step"].to_numpy(),
        times=table["time"].to_numpy(),
        values=values,
        present=np.ones(values.shape, bool),
    )


def _read_compacted(path: Path, wanted: Callable[[str], bool]) -> Block:
    file = pq.ParquetFile(path)
    names = [n for n in file.schema_arrow.names if n not in ("step", "time") and wanted(n)]
    table = file.read(columns=["step", "time", *names])
    values = np.full((table.num_rows, len(names)), np.nan, np.float32)
    present = np.zeros(values.shape, bool)
    for i, name in enumerate(names):
        values[:, i] = table[name].to_numpy()
        present[:, i] = table[name].is_valid().to_numpy()
    steps, times = table["step"].to_numpy(), table["time"].to_numpy()
    rows = present.any(axis=1)  # steps that have none of these metrics are not theirs to serve
    return Block(tuple(names), steps[rows], times[rows], values[rows], present[rows])


def compact(directory: Path) -> None:
    """Turns all parts into one Parquet file with a column per metric; safe to interrupt."""
    parts = sorted(directory.glob("part-*.arrows"))
    merged = merge(read_blocks(directory, lambda _: True))
    if not parts or not len(merged.steps):
        return
    temporary = directory / f".{_COMPACT}.tmp"
    pq.write_table(_to_table(merged), temporary, compression="zstd")
    temporary.replace(directory / _COMPACT)
    # A reader that comes between these lines sees a step twice and serves it once.
    for part in parts:
        part.unlink()


def merge(blocks: Sequence[Block]) -> Block:
    """Lays blocks over one another, oldest first, to one row a step and one column a name.

    Where two carry a value of the same name and step, the later one counts, also if it is NaN: it
    comes from the later training of that step.
    """
    names = tuple(dict.fromkeys(name for block in blocks for name in block.names))
    column = {name: i for i, name in enumerate(names)}
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(b.steps for b in blocks)]))
    times = np.zeros(len(steps))
    values = np.full((len(steps), len(names)), np.nan, np.float32)
    present = np.zeros(values.shape, bool)
    for block in blocks:
        rows = np.searchsorted(steps, block.steps)
        times[rows] = block.times
        columns = np.array([column[name] for name in block.names], np.intp)
        at = np.ix_(rows, columns)
        values[at] = np.where(block.present, block.values, values[at])
        present[at] |= block.present
    return Block(names, steps, times, values, present)


def _to_table(block: Block) -> Any:
    columns = {"step": pa.array(block.steps), "time": pa.array(block.times)}
    for i, name in enumerate(block.names):
        columns[name] = pa.array(block.values[:, i], mask=~block.present[:, i])
    return pa.table(columns)

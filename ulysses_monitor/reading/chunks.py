"""Reads a run piece by piece, in memory that does not grow with the run.

A run is kept column by column, so some metrics at a time take short reads. For some steps at a
time, the columns of a large run go through a temporary file.

Legend: N steps, M metrics of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ulysses_monitor.store import Block

if TYPE_CHECKING:
    from ulysses_monitor.reading.reader import RunReader

__all__ = ["find_last_step", "read_columns", "read_windows"]

_VALUES = 1 << 20
"""Values of a piece; while it is read, a value takes about 20 bytes."""
_MEMORY_BYTES = 8 << 20
"""Bytes of columns that wait in memory, not in a file."""

_Values = npt.NDArray[np.float32]
_Present = npt.NDArray[np.bool_]

_DENSE = ("train/loss/total", "train/step_seconds/total", "grad/norm/total")
"""Almost every step has one of these; others may be sampled."""


def read_columns(
    run: RunReader,
    names: Sequence[str],
    *,
    beside: Mapping[str, str] | None = None,
    last: int | None = None,
) -> Iterator[Block]:
    """Yields all steps of some metrics at a time.

    Args:
        run: the run.
        names: exact names of metrics.
        beside: names of metrics to read along with others, by the names of these.
        last: the last step to read; all if None.
    """
    at, steps = 0, len(run.block(*_DENSE, names[0], missing="ignore").steps) if names else 0
    while at < len(names):
        size = max(1, _VALUES // max(1, steps))
        chosen = list(names[at : at + size])
        at += size
        chosen += [beside[name] for name in chosen if beside and name in beside]
        block = run.block(*chosen, missing="ignore", steps=None if last is None else (None, last))
        if extra := set(block.names) - set(chosen):  # a name may be a pattern, too
            wanted = [i for i, name in enumerate(block.names) if name not in extra]
            block = block.select(wanted).drop_empty_rows()
        yield block
        steps = max(steps, len(block.steps))


def find_last_step(run: RunReader, names: Sequence[str]) -> int | None:
    """Returns the last step that has one of these metrics; None if none has."""
    lasts = [int(b.steps[-1]) for b in read_columns(run, names) if len(b.steps)]
    return max(lasts, default=None)


def read_windows(
    run: RunReader, names: Sequence[str], *, last: int | None = None
) -> Iterator[Block]:
    """Yields some steps at a time, ascending, with all of these metrics.

    Args:
        run: the run.
        names: exact names of metrics.
        last: the last step to read; all if None. For a live run, whose metrics are not read at one
            instant, give a step of which all is known.
    """
    blocks = read_columns(run, names, last=last)
    first, second = next(blocks, Block.empty()), next(blocks, None)
    if second is None:
        yield first
        return
    with SpooledTemporaryFile(_MEMORY_BYTES, prefix="ulysses-") as file:
        columns = [_Spilled.write(file, first), _Spilled.write(file, second)]
        del first, second
        columns += [_Spilled.write(file, block) for block in blocks]
        yield from _join(file, columns)


@dataclass(frozen=True)
class _Spilled:
    """A block of which the values are in a file, a step after another.

    Attributes:
        names: metric names [M].
        steps: ascending [N].
        times: seconds since the epoch [N].
        values: offset of the values in the file.
        present: offset of their presence; None if all are present.
    """

    names: tuple[str, ...]
    steps: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    values: int
    present: int | None

    @classmethod
    def write(cls, file: IO[bytes], block: Block) -> _Spilled:
        values = file.tell()
        file.write(np.ascontiguousarray(block.values, np.float32).data)
        present = None if block.present.all() else file.tell()
        if present is not None:
            file.write(np.ascontiguousarray(block.present).data)
        return cls(block.names, block.steps, block.times, values, present)

    def read(self, file: IO[bytes], first: int, end: int) -> tuple[_Values, _Present]:
        """Returns values and presence [N, M] of the steps at positions `first` to `end`."""
        width, rows = len(self.names), end - first
        file.seek(self.values + 4 * first * width)
        values = np.frombuffer(file.read(4 * rows * width), np.float32).reshape(rows, width)
        if self.present is None:
            return values, np.ones(values.shape, bool)
        file.seek(self.present + first * width)
        present = np.frombuffer(file.read(rows * width), np.bool_)
        return values, present.reshape(rows, width)


def _join(file: IO[bytes], columns: Sequence[_Spilled]) -> Iterator[Block]:
    """Yields blocks of consecutive steps with the columns of all that was spilled."""
    names = tuple(name for part in columns for name in part.names)
    steps = np.unique(np.concatenate([part.steps for part in columns]))
    size = max(1, _VALUES // len(names))
    for begin in range(0, len(steps), size):
        yield _read_window(file, columns, names, steps[begin : begin + size])


def _read_window(
    file: IO[bytes],
    columns: Sequence[_Spilled],
    names: tuple[str, ...],
    steps: npt.NDArray[np.int64],
) -> Block:
    times = np.full(len(steps), np.nan)
    values = np.full((len(steps), len(names)), np.nan, np.float32)
    present = np.zeros(values.shape, bool)
    at = 0
    for part in columns:
        first = int(np.searchsorted(part.steps, steps[0]))
        end = int(np.searchsorted(part.steps, steps[-1], side="right"))
        rows = np.searchsorted(steps, part.steps[first:end])
        own = slice(at, at + len(part.names))
        values[rows, own], present[rows, own] = part.read(file, first, end)
        times[rows] = np.fmax(times[rows], part.times[first:end])
        at += len(part.names)
    return Block(names, steps, times, values, present)

"""The frames of a TensorBoard event file, of which a live one is read on from where it ended.

A record is ``length`` uint64, its checksum uint32, the data, their checksum uint32. TensorBoard's
own loaders read local files only, and compute the checksums byte by byte, which takes longer than
all the rest; here they are computed for all records of the same length at once.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Frame", "find_frames", "masked_crc", "sound"]

Frame = tuple[int, int]
"""Where the data of a record begin and end."""

_LENGTH, _CRC = 8, 4
_LONGEST_CHECKED = 4096
"""Bytes; longer records hold pictures and graphs, not scalars."""

_AT_ONCE = 1 << 14
"""Records; more would take much memory and no less time."""


def _crc_table() -> npt.NDArray[np.uint32]:
    """Castagnoli's, by the byte."""
    table: npt.NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table.astype(np.uint32)


_TABLE = _crc_table()


def masked_crc(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """The checksum that event files carry, of each row of bytes [N, L]."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    rotated = (crc >> np.uint32(15)) | (crc << np.uint32(17))
    return rotated + np.uint32(0xA282EAD8)


def find_frames(data: bytes) -> tuple[list[Frame], int]:
    """The whole records in `data`, and where the rest begins.

    The rest is the torn end of a file that is being written, or a place where the length of a
    record is damaged, from which on nothing can be found.
    """
    frames: list[Frame] = []
    at = 0
    while at + _LENGTH + _CRC <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        begin = at + _LENGTH + _CRC
        if begin + length + _CRC > len(data):
            break
        frames.append((begin, begin + length))
        at = begin + length + _CRC
    good = sound(data, [(b - _LENGTH - _CRC, b - _CRC) for b, _ in frames])
    if good.all():
        return frames, at
    bad = int(good.argmin())
    return frames[:bad], frames[bad][0] - _LENGTH - _CRC


def sound(data: bytes, spans: Sequence[Frame]) -> npt.NDArray[np.bool_]:
    """Whether the checksum that follows each span is that of its bytes; long ones are believed."""
    held = np.frombuffer(data, np.uint8)
    good = np.ones(len(spans), bool)
    alike: dict[int, list[int]] = defaultdict(list)
    for i, (begin, end) in enumerate(spans):
        alike[end - begin].append(i)
    for length, members in alike.items():
        if length > _LONGEST_CHECKED:
            continue
        for first in range(0, len(members), _AT_ONCE):
            some = members[first : first + _AT_ONCE]
            begins = np.array([spans[i][0] for i in some])
            rows = held[begins[:, None] + np.arange(length + _CRC)]
            written = np.ascontiguousarray(rows[:, length:]).view("<u4")[:, 0]
            good[some] = masked_crc(rows[:, :length]) == written
    return good

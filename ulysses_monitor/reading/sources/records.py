"""Finds the records of a TensorBoard event file, which may still be growing.

TensorBoard's own loaders read local files only and compute the checksums in a Python loop over the
bytes, which takes longer than everything else. `common.tfrecord` describes the format.
"""

from __future__ import annotations

import functools
import struct

from ulysses_monitor.common.tfrecord import masked_crc32c

__all__ = ["Frame", "find_frames", "has_sound_checksum", "is_damaged"]

Frame = tuple[int, int]
"""Where the data of a record begin and end."""

_HEADER = struct.Struct("<QI")
_LENGTH_BYTES, _CHECKSUM_BYTES = 8, 4
_HEADER_BYTES = _LENGTH_BYTES + _CHECKSUM_BYTES


def find_frames(data: bytes) -> tuple[list[Frame], int]:
    """Returns the complete records in `data` and where the rest begins.

    The rest is the torn end of a file that is being written, or begins with a record whose length
    is damaged, after which no record can be found.
    """
    frames: list[Frame] = []
    at = 0
    while len(header := data[at : at + _HEADER_BYTES]) == _HEADER_BYTES:
        length = _read_length(header)
        if length is None:
            break
        begin = at + _HEADER_BYTES
        end = begin + length
        if end + _CHECKSUM_BYTES > len(data):
            break
        frames.append((begin, end))
        at = end + _CHECKSUM_BYTES
    return frames, at


def has_sound_checksum(data: bytes, frame: Frame) -> bool:
    """Whether the bytes of `frame` match the checksum that follows them."""
    begin, end = frame
    checksum = int.from_bytes(data[end : end + _CHECKSUM_BYTES], "little")
    return masked_crc32c(data[begin:end]) == checksum


def is_damaged(rest: bytes) -> bool:
    """Whether `rest`, which follows the last complete record, cannot become a record."""
    return len(rest) >= _HEADER_BYTES and _read_length(rest[:_HEADER_BYTES]) is None


@functools.lru_cache(maxsize=1024)  # a file has few different lengths
def _read_length(header: bytes) -> int | None:
    """The length that a record's header holds; None if it does not match its checksum."""
    length: int
    length, checksum = _HEADER.unpack(header)
    return length if masked_crc32c(header[:_LENGTH_BYTES]) == checksum else None

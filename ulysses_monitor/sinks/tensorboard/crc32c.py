"""CRC-32C of an event, vectorised.

TensorBoard checks every record by it and computes it in a Python loop over the bytes, which takes
longer than all the rest of a step and holds the interpreter's lock.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

__all__ = ["masked_crc32c"]

Words = npt.NDArray[np.uint32]

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected (RFC 3720, appendix B.4)
_ONES = 0xFFFFFFFF
_ROW = 512
"""Bytes that are looked up at once; rows are then folded one after the other."""


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord files store it: rotated by 15 bits, plus a constant."""
    crc = _crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ONES


def _crc32c(data: bytes) -> int:
    """The register starts as ones: the same as inverting the first four bytes of the message.

    A CRC is linear: that of a row of bytes is the exclusive or of each byte's own, by its distance
    from the end, and zeros in front change nothing.
    """
    if len(data) < 4:
        return _by_byte(data)
    padded = np.zeros(-(-len(data) // _ROW) * _ROW, np.uint8)
    message = padded[-len(data) :]
    message[:] = np.frombuffer(data, np.uint8)
    message[:4] ^= 0xFF
    rows = _table()[np.arange(_ROW), padded.reshape(-1, _ROW)]
    crc = 0
    for row in np.bitwise_xor.reduce(rows, axis=1).tolist():
        crc = _past_a_row(crc) ^ row
    return crc ^ _ONES


def _by_byte(data: bytes) -> int:
    crc, step = _ONES, _table()[-1]
    for byte in data:
        crc = int(step[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ _ONES


def _past_a_row(crc: int) -> int:
    """The register after a row of zeros: its four bytes enter as the first four of the row."""
    first, second, third, fourth = _heads()
    return (
        first[crc & 0xFF]
        ^ second[crc >> 8 & 0xFF]
        ^ third[crc >> 16 & 0xFF]
        ^ fourth[crc >> 24 & 0xFF]
    )


@functools.cache
def _table() -> Words:
    """What a byte at a place of a row leaves in the register at the row's end [_ROW, 256]."""
    step = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        step = np.where(step & 1, step >> 1 ^ _POLYNOMIAL, step >> 1).astype(np.uint32)
    table = np.empty((_ROW, 256), np.uint32)
    table[-1] = step
    for place in range(_ROW - 2, -1, -1):
        after = table[place + 1]
        table[place] = step[after & 0xFF] ^ (after >> 8)
    return table


@functools.cache
def _heads() -> list[list[int]]:
    heads: list[list[int]] = _table()[:4].tolist()
    return heads

"""The checksum of TFRecord, the format of TensorBoard's event files.

A record is ``length`` uint64, the checksum of those 8 bytes uint32, the data, and their checksum
uint32, all little-endian.
"""

from __future__ import annotations

from google_crc32c import value as crc32c

__all__ = ["masked_crc32c"]


def masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C of `data` as TFRecord stores it: rotated by 15 bits, plus a constant."""
    crc: int = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

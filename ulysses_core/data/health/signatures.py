"""Hashes and MinHash signatures of token rows, a batch at a time.

A signature has `SIZE` bytes. The share of equal bytes of two signatures estimates the Jaccard
similarity of the rows' token triples (Broder 1997), of which b-bit MinHash keeps 8 bits a value
(Li and Koenig 2010).

Legend: N rows, T tokens of all rows, S triples of all rows, K values of a signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

__all__ = ["SIZE", "TRIPLES", "hash_rows", "sign_rows"]

SIZE = 32
"""Values of a signature (K)."""
TRIPLES = 8
"""Token triples that a row must have to be compared: fewer are alike by chance."""

Words = npt.NDArray[np.uint64]

_DRAW = np.random.default_rng(20240601)
_FACTORS: Words = _DRAW.integers(1, 2**63, SIZE, np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS: Words = _DRAW.integers(0, 2**63, SIZE, np.uint64)


def hash_rows(rows: Sequence[Sequence[int]]) -> Words:
    """Returns a hash of each row, which depends on the order of its tokens [N]."""
    tokens, starts, lengths = _join(rows)
    if not len(tokens):
        return np.zeros(len(rows), np.uint64)
    place = np.arange(len(tokens), dtype=np.uint64) - np.repeat(starts, lengths).astype(np.uint64)
    mixed = _mix(tokens * np.uint64(0x9E3779B97F4A7C15) + _mix(place + np.uint64(1)))
    found = np.zeros(len(rows), np.uint64)
    filled = lengths > 0
    found[filled] = np.add.reduceat(mixed, starts[filled])
    return found


def sign_rows(rows: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Returns signatures [N, K], and which rows have enough triples to be compared [N]."""
    tokens, starts, lengths = _join(rows)
    counts = np.maximum(lengths - 2, 0)
    enough = counts >= TRIPLES
    signatures = np.zeros((len(rows), SIZE), np.uint8)
    if not enough.any():
        return signatures, enough
    first = np.repeat(starts[enough], counts[enough])
    begins = np.cumsum(counts[enough]) - counts[enough]
    at = first + np.arange(len(first)) - np.repeat(begins, counts[enough])  # [S]
    triples = _mix(_mix(_mix(tokens[at]) + tokens[at + 1]) + tokens[at + 2])
    for k in range(SIZE):
        values = (triples ^ _OFFSETS[k]) * _FACTORS[k]
        values ^= values >> np.uint64(32)
        least = np.minimum.reduceat(values, begins)
        signatures[enough, k] = (_mix(least) & np.uint64(0xFF)).astype(np.uint8)
    return signatures, enough


def _join(
    rows: Sequence[Sequence[int]],
) -> tuple[Words, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns all tokens [T], and where each row starts and how long it is [N]."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    tokens = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return tokens.astype(np.uint64), np.cumsum(lengths) - lengths, lengths


def _mix(words: Words) -> Words:
    """Returns the words with all bits mixed (the finaliser of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed

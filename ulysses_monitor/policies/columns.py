"""Whole families of metrics at once: policies look at thousands of tensors in each step."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.records.adapter_names import AdapterPair, find_adapter_pairs

__all__ = ["Array", "fingerprint", "lora_pairs", "per_parameter"]

Array = npt.NDArray[np.float64]


def per_parameter(record: StepRecord, prefix: str) -> tuple[tuple[str, ...], Array]:
    """Parameter names [P], the same object as long as the schema is, and their values [P].

    Args:
        record: the step.
        prefix: of the metric, such as ``grad/norm``.
    """
    names, places = _columns(record.schema, f"{prefix}/param/")
    return names, record.values[places]


@lru_cache(maxsize=64)
def _columns(schema: Schema, prefix: str) -> tuple[tuple[str, ...], npt.NDArray[np.intp]]:
    found = [(name, i) for i, name in enumerate(schema.names) if name.startswith(prefix)]
    names = tuple(name.removeprefix(prefix) for name, _ in found)
    return _same(names), np.array([i for _, i in found], np.intp)


@lru_cache(maxsize=64)
def _same(names: tuple[str, ...]) -> tuple[str, ...]:
    """One object for equal tuples, of schemas with other metrics beside."""
    return names


@lru_cache(maxsize=8)
def fingerprint(names: tuple[str, ...]) -> int:
    """A number by which a memory of values per parameter knows whose they are."""
    return zlib.crc32("\n".join(names).encode())


@lru_cache(maxsize=8)
def lora_pairs(names: tuple[str, ...]) -> tuple[AdapterPair, ...]:
    """The adapter pairs among parameter names."""
    return find_adapter_pairs(names)

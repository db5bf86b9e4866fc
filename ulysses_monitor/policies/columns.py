"""Whole families of metrics at once: a policy may look at thousands of tensors in each step."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.records.adapter_names import AdapterPair, find_adapter_pairs

__all__ = ["Array", "fingerprint", "lora_pairs", "parameter_values"]

Array = npt.NDArray[np.float64]


def parameter_values(record: StepRecord, prefix: str) -> tuple[tuple[str, ...], Array]:
    """Returns parameter names [P] and one metric's value for each [P].

    The names are the same object for as long as the schema has the same parameters.

    Args:
        record: the step.
        prefix: family and statistic of the metric, such as ``grad/norm``.
    """
    names, places = _columns(record.schema, f"{prefix}/param/")
    return names, record.values[places]


@lru_cache(maxsize=64)
def _columns(schema: Schema, prefix: str) -> tuple[tuple[str, ...], npt.NDArray[np.intp]]:
    found = [(name, i) for i, name in enumerate(schema.names) if name.startswith(prefix)]
    names = tuple(name.removeprefix(prefix) for name, _ in found)
    return _interned(names), np.array([i for _, i in found], np.intp)


@lru_cache(maxsize=64)
def _interned(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns one object for equal tuples, also across schemas that differ in other metrics."""
    return names


@lru_cache(maxsize=8)
def fingerprint(names: tuple[str, ...]) -> int:
    """Returns a number that identifies the parameters whose values a memory holds."""
    return zlib.crc32("\n".join(names).encode())


@lru_cache(maxsize=8)
def lora_pairs(names: tuple[str, ...]) -> tuple[AdapterPair, ...]:
    """Returns the adapter pairs among parameter names."""
    return find_adapter_pairs(names)

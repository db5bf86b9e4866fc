"""Which metrics of a record a sink takes, found once per schema."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema, StepRecord

__all__ = ["EVERYTHING", "Selection"]

EVERYTHING = ("*",)
"""Patterns that take all metrics."""

_MANY = ("param/", "module/")
"""Scopes of which a real model has thousands; services that draw a chart each cannot bear them."""


class Selection:
    """Shell-style patterns over metric names; ``*`` also matches ``/``.

    Args:
        patterns: a metric that matches one of them is taken; None takes everything except the
            scopes ``param/...`` and ``module/...``.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._patterns = None if patterns is None else tuple(patterns)
        # Weak: a schema that grows is replaced, and the old ones are not kept for a run's length.
        self._cache: weakref.WeakKeyDictionary[Schema, tuple[list[str], npt.NDArray[np.intp]]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, schema: Schema) -> tuple[list[str], npt.NDArray[np.intp]]:
        """The names that are taken, in the schema's order, and their positions in its values."""
        found = self._cache.get(schema)
        if found is None:
            found = self._cache[schema] = self._find(schema)
        return found

    def items(self, record: StepRecord) -> Iterator[tuple[str, float]]:
        """Name and value of each metric that is taken."""
        names, index = self.of(record.schema)
        return zip(names, record.values[index].tolist(), strict=True)

    def _find(self, schema: Schema) -> tuple[list[str], npt.NDArray[np.intp]]:
        if self._patterns is None:
            taken = {name for name in schema.names if not _scope(name).startswith(_MANY)}
        else:
            taken = {name for pattern in self._patterns for name in schema.match(pattern)}
        index = [i for i, name in enumerate(schema.names) if name in taken]
        return [schema.names[i] for i in index], np.array(index, np.intp)


def _scope(name: str) -> str:
    return name.split("/", 2)[-1]

"""Selects the metrics of a record that a sink takes, once per schema."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema, StepRecord

__all__ = ["EVERYTHING", "Selection"]

EVERYTHING = ("*",)
"""Patterns that select all metrics."""

_MANY = ("param/", "module/")
"""Scopes of which a model has thousands, too many for services that draw a chart for each."""


class Selection:
    """Selects metrics by shell-style patterns; ``*`` also matches ``/``.

    Args:
        patterns: metrics that match one of them are selected; None selects everything except the
            scopes ``param/...`` and ``module/...``.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._patterns = None if patterns is None else tuple(patterns)
        # Weak keys, because a growing schema is replaced and the old ones must not stay in memory.
        self._cache: weakref.WeakKeyDictionary[Schema, tuple[list[str], npt.NDArray[np.intp]]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, schema: Schema) -> tuple[list[str], npt.NDArray[np.intp]]:
        """Returns the selected names, in the schema's order, and their positions in its values."""
        found = self._cache.get(schema)
        if found is None:
            found = self._cache[schema] = self._find(schema)
        return found

    def items(self, record: StepRecord) -> Iterator[tuple[str, float]]:
        """Yields name and value of each selected metric."""
        names, index = self.of(record.schema)
        return zip(names, record.values[index].tolist(), strict=True)

    def _find(self, schema: Schema) -> tuple[list[str], npt.NDArray[np.intp]]:
        if self._patterns is None:
            selected = {name for name in schema.names if not _scope(name).startswith(_MANY)}
        else:
            selected = {name for pattern in self._patterns for name in schema.match(pattern)}
        index = [i for i, name in enumerate(schema.names) if name in selected]
        return [schema.names[i] for i in index], np.array(index, np.intp)


def _scope(name: str) -> str:
    return name.split("/", 2)[-1]

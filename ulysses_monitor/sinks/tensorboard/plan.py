"""What TensorBoard gets of a record, found once per schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema
from ulysses_monitor.sinks.selection import Selection

__all__ = ["PERCENTILES", "Plan", "Shown"]

PERCENTILES = (10, 50, 90)

_LAYER = re.compile(r"grad/(norm|nonfinite)/layer/(\d+)$")
_ADAPTERS = re.compile(r"(lora/[^/]+)/module/")
_MANY = re.compile(r"([^/]+/[^/]+/(?:param|module))/")

Positions = npt.NDArray[np.intp]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Where a record of one schema has what TensorBoard gets.

    Attributes:
        tags: of the scalars: first metrics by their names, then percentiles.
        metrics: positions of those metrics.
        adapters: positions of each LoRA statistic's modules, which make three percentiles.
        layers: the layers' numbers.
        norms: positions of the layers' gradient norms, in that order.
        nonfinite: positions of their counts of NaN and Inf; empty if they are not recorded.
        histograms: positions of the values of each histogram, by its tag.
        hidden: how many metrics of single parameters and modules have no tag of their own.
    """

    tags: tuple[str, ...]
    metrics: Positions
    adapters: tuple[Positions, ...]
    layers: tuple[int, ...]
    norms: Positions
    nonfinite: Positions
    histograms: dict[str, Positions]
    hidden: int

    def values(self, values: Values) -> npt.NDArray[np.float32]:
        """A value for each of `tags`, in the precision that TensorBoard stores."""
        parts = [values[self.metrics], *(_percentiles(values[i]) for i in self.adapters)]
        with np.errstate(over="ignore"):
            return np.concatenate(parts).astype(np.float32)

    def layer_norms(self, values: Values) -> Values:
        """The layers' gradient norms, infinite where elements that are not finite were left out."""
        norms = values[self.norms]
        if len(self.nonfinite):
            norms = np.where(values[self.nonfinite] > 0, np.inf, norms)
        return norms


class Shown:
    """Makes plans: totals, layers and percentiles, and whatever else is asked for.

    Args:
        parameters: patterns of further metrics, of single parameters and modules.
        histograms: patterns of the metrics whose distribution over parameters or modules is shown.
    """

    def __init__(self, parameters: Sequence[str], histograms: Sequence[str]) -> None:
        self._few = Selection(None)
        self._asked = Selection(parameters)
        self._spread = Selection(histograms)

    def plan(self, schema: Schema) -> Plan:
        """What is shown of records of `schema`."""
        few, asked = self._few.of(schema)[1], self._asked.of(schema)[1]
        metrics = np.union1d(few, asked)
        adapters = _groups(_ADAPTERS, list(enumerate(schema.names)))
        adapters = {stat: places for stat, places in adapters.items() if len(places) > 1}
        tags = [schema.names[i] for i in metrics]
        tags += [f"{stat}/p{p}" for stat in adapters for p in PERCENTILES]
        layers, norms, nonfinite = _layers(schema)
        return Plan(
            tags=tuple(tags),
            metrics=metrics,
            adapters=tuple(adapters.values()),
            layers=layers,
            norms=norms,
            nonfinite=nonfinite,
            histograms=_groups(_MANY, [(i, schema.names[i]) for i in self._spread.of(schema)[1]]),
            hidden=len(schema.names) - len(metrics),
        )


def _groups(pattern: re.Pattern[str], names: Sequence[tuple[int, str]]) -> dict[str, Positions]:
    """Positions by the first group of `pattern`, of names that begin with it."""
    found: dict[str, list[int]] = {}
    for i, name in names:
        if match := pattern.match(name):
            found.setdefault(match[1], []).append(i)
    return {key: np.array(places, np.intp) for key, places in found.items()}


def _layers(schema: Schema) -> tuple[tuple[int, ...], Positions, Positions]:
    places: dict[str, dict[int, int]] = {"norm": {}, "nonfinite": {}}
    for i, name in enumerate(schema.names):
        if match := _LAYER.match(name):
            places[match[1]][int(match[2])] = i
    layers = tuple(sorted(places["norm"]))
    counted = layers if set(layers) <= set(places["nonfinite"]) else ()
    norms = np.array([places["norm"][n] for n in layers], np.intp)
    return layers, norms, np.array([places["nonfinite"][n] for n in counted], np.intp)


def _percentiles(values: Values) -> Values:
    """Of those that are known; infinite where they reach into infinite values."""
    known = values[~np.isnan(values)]
    if not len(known):
        return np.full(len(PERCENTILES), np.nan)
    with np.errstate(invalid="ignore"):  # between two infinite values
        found: Values = np.percentile(known, PERCENTILES)
    return found

"""Plans what TensorBoard gets from a record, once per schema.

Legend: L layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records import Schema
from ulysses_monitor.records.layers import Layer, order_layers
from ulysses_monitor.records.nonfinite import pair_norms
from ulysses_monitor.sinks.selection import Selection

__all__ = ["PERCENTILES", "Plan", "Planner"]

PERCENTILES = (10, 50, 90)

_LAYER = re.compile(r"grad/(norm|nonfinite)/layer/(.+)$")
_ADAPTERS = re.compile(r"(lora/[^/]+)/module/")
_MANY = re.compile(r"([^/]+/[^/]+/(?:param|module))/")

Positions = npt.NDArray[np.intp]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """The positions, in the records of one schema, of what TensorBoard gets.

    Attributes:
        tags: tags of the scalars: first metrics by name, then percentiles.
        metrics: positions of those metrics.
        adapters: positions of the modules of each LoRA statistic, which give three percentiles.
        layers: the layers, in order [L].
        norms: positions of the layers' gradient norms [L].
        nonfinite: positions of the layers' counts of NaN and Inf [L]; empty if not recorded.
        histograms: positions of the values of each histogram, by tag.
        hidden: number of metrics that have no tag.
        partial: positions of gradient norms, and of the counts of NaN and Inf that they leave out.
    """

    tags: tuple[str, ...]
    metrics: Positions
    adapters: tuple[Positions, ...]
    layers: tuple[Layer, ...]
    norms: Positions
    nonfinite: Positions
    histograms: dict[str, Positions]
    hidden: int
    partial: tuple[list[int], list[int]]

    def values(self, values: Values) -> npt.NDArray[np.float32]:
        """Returns a value for each tag, in the precision that TensorBoard stores."""
        norms, counts = self.partial
        if norms and (values[counts] > 0).any():
            values = values.copy()
            values[norms] = np.where(values[counts] > 0, np.nan, values[norms])
        parts = [values[self.metrics], *(_percentiles(values[i]) for i in self.adapters)]
        with np.errstate(over="ignore"):
            return np.concatenate(parts).astype(np.float32)

    def layer_norms(self, values: Values) -> Values:
        """Returns the layers' gradient norms [L], infinite if a layer has NaN or Inf."""
        norms = values[self.norms]
        if len(self.nonfinite):
            norms = np.where(values[self.nonfinite] > 0, np.inf, norms)
        return norms


class Planner:
    """Plans to show totals, layers, percentiles, and what the user requests.

    Args:
        parameters: patterns of metrics of single parameters and modules to show.
        histograms: patterns of metrics to show as distributions over parameters or modules.
    """

    def __init__(self, parameters: Sequence[str], histograms: Sequence[str]) -> None:
        self._default = Selection(None)
        self._requested = Selection(parameters)
        self._distributions = Selection(histograms)

    def plan(self, schema: Schema) -> Plan:
        """Returns the plan for records of `schema`."""
        default, requested = self._default.of(schema)[1], self._requested.of(schema)[1]
        metrics = np.union1d(default, requested)
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
            histograms=_groups(
                _MANY, [(i, schema.names[i]) for i in self._distributions.of(schema)[1]]
            ),
            hidden=len(schema.names) - len(metrics),
            partial=pair_norms(schema.names),
        )


def _groups(pattern: re.Pattern[str], names: Sequence[tuple[int, str]]) -> dict[str, Positions]:
    """Groups positions by the first group of `pattern`; other names are left out."""
    found: dict[str, list[int]] = {}
    for i, name in names:
        if match := pattern.match(name):
            found.setdefault(match[1], []).append(i)
    return {key: np.array(places, np.intp) for key, places in found.items()}


def _layers(schema: Schema) -> tuple[tuple[Layer, ...], Positions, Positions]:
    places: dict[str, dict[str, int]] = {"norm": {}, "nonfinite": {}}
    for i, name in enumerate(schema.names):
        if match := _LAYER.match(name):
            places[match[1]][match[2]] = i
    layers = order_layers(places["norm"])
    scopes = [str(layer) for layer in layers]
    counted = scopes if set(scopes) <= set(places["nonfinite"]) else ()
    norms = np.array([places["norm"][scope] for scope in scopes], np.intp)
    return layers, norms, np.array([places["nonfinite"][scope] for scope in counted], np.intp)


def _percentiles(values: Values) -> Values:
    """Returns percentiles of the values that are not NaN; they may be infinite."""
    known = values[~np.isnan(values)]
    if not len(known):
        return np.full(len(PERCENTILES), np.nan)
    with np.errstate(invalid="ignore"):  # between two infinite values
        found: Values = np.percentile(known, PERCENTILES)
    return found

"""Groups parameters into layers and adapter pairs by their names, once per engine.

Legend: P trainable parameters, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ulysses_monitor.records.adapter_names import AdapterPair, find_adapter_pairs
from ulysses_monitor.records.layers import Layer, order_layers

__all__ = ["Layout", "find_blocks", "median", "metric_names"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Layout:
    """Names and sizes of the trainable parameters, in the engine's order.

    Attributes:
        names: full parameter names [P].
        numels: number of elements of each full parameter [P].
        model: names of all parameters of the model, trained or not; by default those in `names`.
        expert_adapters: names of modules whose A and B hold the adapters of several experts.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    model: tuple[str, ...] = ()
    expert_adapters: frozenset[str] = frozenset()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that have a trainable parameter [L]: by number, or by path and number.

        A model with several block lists (an encoder and a decoder, a vision tower and a language
        model) has several layers of one number, which only the path of the list tells apart. It
        has them whatever is trained, so a layer keeps its name while parts of a model are frozen.
        """
        return order_layers(layer for layer in self.layer_of if layer is not None)

    @cached_property
    def layer_of(self) -> tuple[str | None, ...]:
        """The layer that each of `names` belongs to [P]; None outside of blocks."""
        is_one_list = len({path for path, _ in filter(None, map(_place, self.model))}) <= 1
        paths = [_place(name) for name in self.names]
        is_one_list &= len({path for path, _ in filter(None, paths)}) <= 1
        return tuple(p and (p[1] if is_one_list else ".".join(p)) for p in paths)

    @cached_property
    def scopes(self) -> tuple[str, ...]:
        """Scope names in the order of `aggregate`: total, layers, parameters [1 + L + P]."""
        layers = [f"layer/{i}" for i in self.layers]
        return ("total", *layers, *(f"param/{name}" for name in self.names))

    def aggregate(self, sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns sums of total, layers and parameters [1 + L + P] from sums of parameters [P]."""
        return np.concatenate(([sums.sum()], self._layer_matrix @ sums, sums))

    def aggregate_max(self, maxima: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns maxima of total, layers and parameters [1 + L + P] from the parameters' [P]."""
        layers = [maxima[row > 0].max() for row in self._layer_matrix]
        return np.concatenate(([maxima.max()], layers, maxima))

    @cached_property
    def _layer_matrix(self) -> npt.NDArray[np.float64]:
        """Ones where a parameter belongs to a layer [L, P]."""
        rows = [[float(of == str(layer)) for of in self.layer_of] for layer in self.layers]
        return np.array(rows, np.float64).reshape(len(self.layers), len(self.names))

    @cached_property
    def adapter_pairs(self) -> tuple[AdapterPair, ...]:
        """Every module that has both A and B of one adapter.

        The experts' adapters of one module are left out: a norm or a product of all of them says
        nothing of any.
        """
        pairs = find_adapter_pairs(self.names)
        return tuple(pair for pair in pairs if pair.path not in self.expert_adapters)


def _place(name: str) -> tuple[str, str] | None:
    """Returns the path of a parameter's block list and the number in it; None outside of blocks."""
    match = _LAYER.search(name)
    return match and (name[: match.start(1) - 1], match[1])


def find_blocks(modules: Iterable[str], parameters: tuple[str, ...]) -> dict[str, str]:
    """Returns the modules that are blocks, such as ``model.layers.3``, and the layer that each is.

    Args:
        modules: names of a model's modules.
        parameters: names of all of its parameters, which say whether it has several block lists.
    """
    places = {name: _place(name) for name in modules}
    blocks = tuple(name for name, place in places.items() if place and ".".join(place) == name)
    layers = Layout(blocks, (0,) * len(blocks), parameters).layer_of
    return {name: layer for name, layer in zip(blocks, layers, strict=True) if layer is not None}


def metric_names(prefix: str, layout: Layout) -> tuple[str, ...]:
    """Returns the names of a metric that has every scope [1 + L + P]."""
    return tuple(f"{prefix}/{scope}" for scope in layout.scopes)


def median(values: npt.NDArray[np.float64]) -> float:
    """Returns the median of the values that are not NaN, or NaN without any."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")

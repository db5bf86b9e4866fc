"""``lora/delta_ratio/*`` and ``lora/stable_rank/*``: what the adapters have learned.

Both come from r x r matrices alone, never from a dense BA. The eigenvalues of
G = (B^T B)(A A^T) are the squared singular values of BA, so:

- ||BA||_F^2 = tr G
- ||BA||_2^2 = the largest eigenvalue of G, by repeated squaring: tr(G^(2^k))^(1 / 2^k)

The stable rank is ||BA||_F^2 / ||BA||_2^2 (Rudelson and Vershynin, arXiv math/0503442). It lies
between 1 and r.

Legend: r LoRA rank, I input features, O output features, N adapter pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.engines import Engine
from ulysses_monitor.engines.support import strip_wrappers
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.probes.layout import Layout, median
from ulysses_monitor.probes.sums import statistics
from ulysses_monitor.records import Cost
from ulysses_monitor.records.adapter_names import AdapterPair

__all__ = ["AdapterProbe"]

Array = npt.NDArray[np.float64]

_SQUARINGS = 24
"""tr(G^(2^24))^(1 / 2^24) exceeds the largest eigenvalue by at most r^(2^-24), about 1e-7 of it."""


@dataclass
class _Pair:
    """One adapter on one module, as PEFT keeps it."""

    name: str
    module: nn.Module
    adapter: str
    index: int
    grams: dict[str, Tensor]
    """B^T B and A A^T [r, r], taken in a forward pass if the parameters are sharded."""
    base_squares: Tensor | None = None
    """This rank's part of the base weight's squared norm, once read."""

    def side(self, which: str) -> nn.Parameter:
        """Returns A [r, I, ...] or B [O, r, ...]; PEFT keeps those of embeddings elsewhere."""
        for kind in ("lora", "lora_embedding"):
            held = getattr(self.module, f"{kind}_{which}", {})
            if self.adapter in held:
                found = held[self.adapter]
                return found if isinstance(found, nn.Parameter) else found.weight
        raise KeyError(f"{self.name} has no lora_{which}")

    def base(self) -> nn.Parameter | None:
        """Returns the weight that the adapter adds to, or None if it is quantized.

        An adapter of a parameter (`target_parameters`) knows its name.
        """
        layer: Any = self.module
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        weight = getattr(layer, str(getattr(self.module, "parameter_name", "weight")), None)
        is_dense = isinstance(weight, nn.Parameter) and weight.is_floating_point()
        return weight if is_dense else None

    def scale(self) -> float:
        """Returns the adapter's alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return float(self.module.scaling[self.adapter])  # type: ignore[index]


class AdapterProbe:
    """Reads the adapters of a model; the ranks share the pairs.

    The probe gathers no sharded parameters (ZeRO-3, FSDP2). The forward pass gathers them anyway,
    and a hook reads them there.

    Args:
        layout: the parameters.
        engine: the engine.
        next_is_sampled: tells whether the coming step is one at which this probe is read.
    """

    name = "adapters"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, layout: Layout, engine: Engine, next_is_sampled: Callable[[], bool]) -> None:
        self._engine, self._next_is_sampled = engine, next_is_sampled
        modules = {strip_wrappers(name): module for name, module in engine.model.named_modules()}
        self._pairs = [
            _Pair(p.module, modules[p.path], p.adapter, i, {})
            for i, p in enumerate(layout.adapter_pairs)
            if _is_peft(modules.get(p.path), p)
        ]
        self.size = 4 * len(self._pairs)
        self.names = tuple(
            name
            for stat in ("delta_ratio", "stable_rank")
            for name in (
                *(f"lora/{stat}/module/{p.name}" for p in self._pairs),
                f"lora/{stat}/total",
            )
        )
        ranks, rank = 1, 0
        if engine.group is not None:
            ranks, rank = dist.get_world_size(engine.group), dist.get_rank(engine.group)
        self._own_pairs = [p for p in self._pairs if p.index % ranks == rank]
        self._undos = [undo for p in self._own_pairs for undo in self._hook_forward(p)]

    def close(self) -> None:
        """Removes the hooks."""
        undo_all(self._undos)

    def _hook_forward(self, pair: _Pair) -> list[Undo]:
        """Hooks the layers of A and B, if this rank holds them in full only in a forward pass."""
        undos: list[Undo] = []
        for which in "AB":
            if self._engine.full_parameter(pair.side(which)) is not None:
                continue
            layer = getattr(pair.module, f"lora_{which}", {})
            if pair.adapter in layer:  # no module's forward pass reads A and B of an embedding
                hook = self._gram_hook(pair, which)
                undos.append(layer[pair.adapter].register_forward_pre_hook(hook).remove)
        return undos

    def _gram_hook(self, pair: _Pair, which: str) -> Callable[..., None]:
        def read_gram(layer: Any, args: Any) -> None:  # noqa: ARG001
            if self._next_is_sampled() and which not in pair.grams:
                with torch.no_grad():
                    pair.grams[which] = _gram(layer.weight, which)

        # A compiled model steps out of its graph here; tracing the hook would freeze the condition.
        return cast("Callable[..., None]", torch.compiler.disable(read_gram))

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002
        """Returns, for each pair [N * 4]: ||BA||_F^2, ||BA||_2^2, 1 if known, a part of ||W||^2."""
        device = self._engine.device
        result = torch.zeros(len(self._pairs), 4, dtype=torch.float64, device=device)
        rows = {id(pair): row for pair, row in zip(self._pairs, result, strict=True)}
        for pair in self._own_pairs:
            grams = {w: self._gram_of(pair, w) for w in "AB"}
            if grams["A"] is not None and grams["B"] is not None:
                found = _squared_norms(grams["B"] @ grams["A"])
                rows[id(pair)][:3] = torch.cat([found, torch.ones_like(found[:1])])
        for pair in self._pairs:
            rows[id(pair)][3] = self._base_squares(pair)
            pair.grams.clear()
        return result.flatten()  # [N, 4] -> [N * 4]

    def _gram_of(self, pair: _Pair, which: str) -> Tensor | None:
        full = self._engine.full_parameter(pair.side(which))
        return pair.grams.get(which) if full is None else _gram(full, which)

    def _base_squares(self, pair: _Pair) -> Tensor | float:
        """Returns this rank's part of ||W||^2, read only once if the base is frozen.

        If every rank holds the base in full, one rank counts it.
        """
        weight = pair.base()
        if weight is None or (
            self._engine.full_parameter(weight) is not None and pair not in self._own_pairs
        ):
            return 0.0
        if pair.base_squares is None or weight.requires_grad:
            pair.base_squares = statistics([self._engine.local_parameter(weight)])[0, 0]
        return pair.base_squares

    def values(self, totals: Array) -> Array | None:
        """See `Probe.values`; NaN if the base is quantized, or if BA is zero."""
        frobenius, spectral, known, base = totals.reshape(-1, 4).T  # [N * 4] -> [4, N]
        if not known.any():
            return None
        scales = np.array([pair.scale() for pair in self._pairs])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(known > 0, scales * np.sqrt(frobenius / base), np.nan)
            ratios[base == 0] = np.nan
            ranks = np.where(known > 0, frobenius / spectral, np.nan)
        return np.concatenate([ratios, [median(ratios)], ranks, [median(ranks)]])


def _is_peft(module: nn.Module | None, pair: AdapterPair) -> bool:
    return module is not None and pair.adapter in getattr(module, "scaling", {})


def _gram(weight: Tensor, which: str) -> Tensor:
    """Returns A A^T or B^T B, float64 [r, r].

    Convolutions have A [r, I, k, k] and B [O, r, 1, 1].
    """
    flat = weight.detach().double().flatten(1)  # [r, I, k, k] -> [r, I*k*k], [O, r, 1, 1] -> [O, r]
    return flat @ flat.t() if which == "A" else flat.t() @ flat


def _squared_norms(product: Tensor) -> Tensor:
    """Returns ||BA||_F^2 and ||BA||_2^2 [2] from G = (B^T B)(A A^T) [r, r]; zeros if G is zero."""
    trace = product.trace()
    power, logarithm, weight = product, torch.zeros_like(trace), 1.0
    for _ in range(_SQUARINGS):
        scale = power.trace()
        logarithm = logarithm + weight * scale.log()
        power = power / scale
        power = power @ power
        weight /= 2
    logarithm = logarithm + weight * power.trace().log()
    largest = logarithm.exp()
    return torch.stack([trace, torch.where(trace > 0, largest, torch.zeros_like(largest))])

"""Edits of gradients over local shards, with the same result however they are sharded.

Every rank calls an edit with the same action; edits that need a sum over shards share a collective.
Each edit declares its collectives, so that a rank on which it fails still takes part in them.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.engines import Engine, Shard
from ulysses_monitor.probes.sums import statistics
from ulysses_monitor.records import Action
from ulysses_monitor.records.adapter_names import find_adapter_pairs
from ulysses_monitor.steering.acting.noise import gaussian, noise_key
from ulysses_monitor.steering.acting.rows import expand_rows, sum_rows

__all__ = ["EDITS", "Edit", "Targets"]

_MIN_NORM = 1e-3
"""Least norm of a row of weights in adaptive gradient clipping (arXiv:2102.06171, section 4.1)."""


@dataclass(frozen=True)
class Targets:
    """The gradients that an action changes.

    Attributes:
        engine: what is trained.
        action: what to do.
        step: the optimizer step.
        seed: the run's seed, for noise.
        summed: sizes of the sums over ranks that were made so far.
    """

    engine: Engine
    action: Action
    step: int
    seed: int
    summed: list[int] = field(default_factory=list)

    def names(self) -> dict[int, str]:
        """Returns the names of the parameters that the action targets, by index."""
        every = [name for name, _ in self.engine.parameters()]
        # A policy may name thousands of parameters one by one.
        exact = set(self.action.targets)
        patterns = [pattern for pattern in exact if any(c in pattern for c in "*?[")]
        return {
            i: name
            for i, name in enumerate(every)
            if name in exact or any(fnmatch.fnmatchcase(name, p) for p in patterns)
        }

    def shards(self) -> Iterator[tuple[str, Shard, Tensor]]:
        """Yields name, shard and gradient of each target that has a gradient on this rank."""
        names = self.names()
        for shard in self.engine.shards():
            if shard.index in names and shard.grad is not None:
                yield names[shard.index], shard, shard.grad

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Returns (R, L) of each target whose rows have several elements, by name."""
        shapes = self.engine.shapes()
        found = {}
        for i, name in self.names().items():
            rows, *rest = shapes[i] or (1,)
            length = torch.Size(rest).numel()
            if rest and length > 1:
                found[name] = rows, length
        return found

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sums over ranks what counted shards contributed."""
        self.summed.append(values.numel())
        if dist.is_initialized() and dist.get_world_size() > 1:
            values = values.to(self.engine.device)
            dist.all_reduce(values)
        return values

    def scale(self) -> Any:
        """Returns the loss scale that the gradients still carry."""
        return self.engine.grad_scale()

    def count_rows(self) -> int:
        """Returns the number of rows of all matrices."""
        return sum(rows for rows, _ in self.matrices().values())


@dataclass(frozen=True)
class Edit:
    """An edit, and the sizes of the sums over ranks that it makes, the same on all ranks."""

    apply: Callable[[Targets], None]
    sum_sizes: Callable[[Targets], Sequence[int]] = lambda _: ()


def _change_each(targets: Targets, change: Callable[[str, Shard, Tensor], Tensor]) -> None:
    for name, shard, grad in targets.shards():
        targets.engine.set_gradient(shard, change(name, shard, grad))


def add_noise(targets: Targets) -> None:
    """Adds Gaussian noise of standard deviation ``std`` (arXiv:1511.06807).

    A gradient that is all zero stays: some engines give zeros where there is no gradient, and an
    unused part of the model must not move.
    """
    std, nonzero = targets.action.values["std"] * targets.scale(), _find_nonzero(targets)

    def change(name: str, shard: Shard, grad: Tensor) -> Tensor:
        if shard.index not in nonzero:
            return grad
        key = noise_key(targets.seed, targets.step, name)
        noise = gaussian(key, shard.offset, grad.numel(), grad.device)
        changed: Tensor = grad + noise.view_as(grad) * std
        return changed.to(grad.dtype)

    _change_each(targets, change)


def _find_nonzero(targets: Targets) -> set[int]:
    """Returns the indices of the parameters whose gradient is not all zero on every rank."""
    found = torch.zeros(len(targets.engine.parameters()), device=targets.engine.device)
    for _, shard, grad in targets.shards():
        if shard.is_counted:
            found[shard.index] = grad.any()
    return set(targets.sum_over_ranks(found).nonzero().flatten().tolist())


def scale(targets: Targets) -> None:
    """Multiplies by ``factor``."""
    factor = targets.action.values["factor"]
    _change_each(targets, lambda _, __, grad: grad.mul(factor))


def scale_each(targets: Targets) -> None:
    """Multiplies each parameter's gradient by the value under its name; the others stay."""
    factors = targets.action.values
    for name, shard, grad in targets.shards():
        if name in factors:
            targets.engine.set_gradient(shard, grad * factors[name])


def clip_each(targets: Targets) -> None:
    """Scales each parameter's gradient down to the norm under its name; the others stay."""
    limits = targets.action.values
    norms = _norms(targets)
    for name, shard, grad in targets.shards():
        if name in limits and norms[shard.index] > limits[name]:
            targets.engine.set_gradient(shard, grad * (limits[name] / norms[shard.index]))


def balance_lora(targets: Targets) -> None:
    """Raises the smaller gradient of each adapter pair to ``share`` of the larger's norm."""
    share, norms = targets.action.values["share"], _norms(targets)
    every = [name for name, _ in targets.engine.parameters()]
    chosen, factors = targets.names(), {}
    for pair in find_adapter_pairs(every):
        if pair.a not in chosen or pair.b not in chosen:
            continue
        small, large = sorted((pair.a, pair.b), key=lambda i: norms[i])
        if 0 < norms[small] < share * norms[large]:
            factors[small] = share * norms[large] / norms[small]
    for _, shard, grad in targets.shards():
        if shard.index in factors:
            targets.engine.set_gradient(shard, grad * factors[shard.index])


def _norms(targets: Targets) -> list[float]:
    """Returns the norm of every parameter's gradient, 0 for parameters that are not targets."""
    held = [(shard.index, grad) for _, shard, grad in targets.shards() if shard.is_counted]
    squares = torch.zeros(len(targets.engine.parameters()), dtype=torch.float64)
    if held:
        own = statistics([grad for _, grad in held])[0].double().cpu()
        squares.index_add_(0, torch.tensor([i for i, _ in held]), own)
    scale = float(targets.scale())
    return [math.sqrt(square) / scale for square in targets.sum_over_ranks(squares).tolist()]


def freeze(targets: Targets) -> None:
    """Zeroes the gradient; `UpdateGate` keeps the optimizer from updating the parameter."""
    _change_each(targets, lambda _, __, grad: torch.zeros_like(grad))


def clip_value(targets: Targets) -> None:
    """Clamps every element to [-``limit``, ``limit``]."""
    limit = targets.action.values["limit"] * targets.scale()
    _change_each(targets, lambda _, __, grad: torch.clamp(grad, min=-limit, max=limit))


def clip_norm(targets: Targets) -> None:
    """Scales all targets together down to the norm ``max_norm``, like `clip_grad_norm_`."""
    grads = [grad for _, shard, grad in targets.shards() if shard.is_counted]
    squares = statistics(grads)[0].sum() if grads else torch.zeros((), dtype=torch.float64)
    norm = targets.sum_over_ranks(squares.reshape(1)).sqrt() / targets.scale()
    factor = float(torch.clamp(targets.action.values["max_norm"] / (norm + 1e-6), max=1.0))
    if factor < 1.0:
        _change_each(targets, lambda _, __, grad: grad.mul(factor))


def centralize(targets: Targets) -> None:
    """Subtracts each row's mean (arXiv:2004.01461) from rows of several elements.

    A LoRA B of rank 1 has rows of one element, which would become zero.
    """
    matrices = targets.matrices()
    sums = _sums_of_rows(targets, matrices, lambda _, grad: grad)

    def change(name: str, shard: Shard, grad: Tensor) -> Tensor:
        if name not in matrices:
            return grad
        _, length = matrices[name]
        means = expand_rows(sums[name] / length, shard.offset, grad.numel(), length)
        return grad - means.view_as(grad).to(grad.dtype)

    _change_each(targets, change)


def clip_rows(targets: Targets) -> None:
    """Clips each row's norm to ``ratio`` of its weights' norm (AGC, arXiv:2102.06171).

    Only rows of several elements are clipped.
    """
    matrices, ratio = targets.matrices(), targets.action.values["ratio"]
    grads = _sums_of_rows(targets, matrices, lambda _, grad: grad.double().square())
    weights = _sums_of_rows(targets, matrices, lambda shard, _: shard.param.double().square())
    loss_scale = targets.scale()

    def change(name: str, shard: Shard, grad: Tensor) -> Tensor:
        if name not in matrices:
            return grad
        _, length = matrices[name]
        limits = ratio * weights[name].sqrt().clamp(min=_MIN_NORM)
        norms = (grads[name].sqrt() / loss_scale).clamp(min=1e-6)
        factors = (limits / norms).clamp(max=1.0)
        wide = expand_rows(factors, shard.offset, grad.numel(), length)
        return grad * wide.view_as(grad).to(grad.dtype)

    _change_each(targets, change)


def _sums_of_rows(
    targets: Targets,
    matrices: Mapping[str, tuple[int, int]],
    of: Callable[[Shard, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Returns the sum over each row of every matrix [R], with one collective for all of them."""
    starts: dict[str, int] = {}
    size = 0
    for name, (rows, _) in matrices.items():
        starts[name], size = size, size + rows
    flat = torch.zeros(size, dtype=torch.float64, device=targets.engine.device)
    for name, shard, grad in targets.shards():
        if shard.is_counted and name in matrices and grad.numel():
            first, sums = sum_rows(of(shard, grad), shard.offset, matrices[name][1])
            at = starts[name] + first
            flat[at : at + len(sums)] += sums.to(flat.device)
    flat = targets.sum_over_ranks(flat)
    return {name: flat[at : at + matrices[name][0]] for name, at in starts.items()}


def _one_per_parameter(targets: Targets) -> Sequence[int]:
    return (len(targets.engine.parameters()),)


EDITS: dict[str, Edit] = {
    "add_noise": Edit(add_noise, _one_per_parameter),
    "balance_lora": Edit(balance_lora, _one_per_parameter),
    "centralize": Edit(centralize, lambda targets: (targets.count_rows(),)),
    "clip_each": Edit(clip_each, _one_per_parameter),
    "clip_norm": Edit(clip_norm, lambda _: (1,)),
    "clip_rows": Edit(clip_rows, lambda targets: (targets.count_rows(),) * 2),
    "clip_value": Edit(clip_value),
    "freeze": Edit(freeze),
    "scale": Edit(scale),
    "scale_each": Edit(scale_each),
}
"""Edits by `Action.kind`."""

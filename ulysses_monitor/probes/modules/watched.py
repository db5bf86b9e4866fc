"""One watched module: its hooks, and what they add up over a step's micro-batches.

Legend: N experts of a block, R sums of `moments`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo
from ulysses_monitor.engines.support import strip_wrappers
from ulysses_monitor.probes.layout import find_blocks
from ulysses_monitor.probes.modules.inside import Inside, count_experts
from ulysses_monitor.probes.modules.moments import SUMS, measure

__all__ = ["Taken", "Watched", "find_watched"]

_ACT, _GRAD, _LOGIT = range(3)


@dataclass
class Taken:
    """What a module gave and got in a step, on this rank.

    Attributes:
        activations: sums of what it gave [R].
        gradients: sums of the gradients of that [R], still multiplied by `scale`.
        largest: largest activation, gradient and attention logit [3].
        load: tokens that each expert got [N].
        scale: the loss scale of the backward pass.
    """

    activations: Tensor
    gradients: Tensor
    largest: Tensor
    load: Tensor
    scale: Tensor | float = 1.0


class Watched:
    """Looks at a module's forward and backward passes.

    Args:
        module: the module.
        scope: its scope in metrics.
        coming: returns the number of the coming step if it is read, else None.
        guard: keeps a failure out of the training.
        sees_gradients: whether to look at the gradients of what it gives.
        sees_attention: whether to look at attention logits.
        grad_scale: returns the loss scale.
    """

    def __init__(
        self,
        module: nn.Module,
        scope: str,
        coming: Callable[[], int | None],
        guard: Guard,
        *,
        sees_gradients: bool,
        sees_attention: bool,
        grad_scale: Callable[[], Tensor | float],
    ) -> None:
        self.scope, self.experts = scope, count_experts(module)
        self._coming, self._guard, self._grad_scale = coming, guard, grad_scale
        self._sees_gradients = sees_gradients
        self._inside = Inside(
            self._see_logit if sees_attention else None,
            self._see_route if self.experts else None,
            self.experts,
            self._guarded,
        )
        self._looks_inside = sees_attention or bool(self.experts)
        self._entered = ExitStack()
        self._start_step(None)
        enter = module.register_forward_pre_hook(self._enter)
        leave = module.register_forward_hook(self._leave, always_call=True)
        self.undos: list[Undo] = [enter.remove, leave.remove]

    def _start_step(self, step: int | None) -> None:
        self._step, self._seen = step, 0
        zeros = torch.zeros(SUMS, dtype=torch.float64)
        self._taken = Taken(
            zeros,
            zeros,
            torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64),
            torch.zeros(self.experts, dtype=torch.float64),
        )

    def take(self) -> Taken:
        """Returns what was seen in the coming step."""
        self._follow_step()
        return self._taken

    def _follow_step(self) -> bool:
        """Starts anew if another step has begun; returns whether it is read."""
        step = self._coming()
        if step is not None and step != self._step:
            self._start_step(step)
        return step is not None

    def _guarded(self, function: Callable[[], None]) -> None:
        """Calls `function`; if it fails, no rank has metrics of this step's modules."""

        def call() -> bool:
            function()
            return True

        if not self._guard.call("looking at modules", call, False):
            self._taken.activations = torch.full((SUMS,), math.nan, dtype=torch.float64)

    # -- the forward pass ------------------------------------------------------------------------

    def _is_wanted(self, module: nn.Module) -> bool:
        if not (module.training and torch.is_grad_enabled() and self._follow_step()):
            return False
        # A block that is computed again in the backward pass counts only if it did not before: a
        # checkpoint may run the first pass without gradients.
        return not _is_in_backward() or self._seen == 0

    def _enter(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._looks_inside and self._is_wanted(module):
            self._entered.enter_context(self._inside)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._entered.close()
        if output is not None and self._is_wanted(module):
            self._guarded(partial(self._see, output))

    def _see(self, output: Any) -> None:
        found = next(_tensors_in(output), None)
        if found is None:
            return
        with torch.no_grad():
            self._add("activations", _ACT, found)
        if not _is_in_backward():
            self._seen += 1
        if self._sees_gradients and found.requires_grad:
            found.register_hook(self._see_gradient)

    # -- what hooks and the function mode tell -----------------------------------------------------

    def _see_gradient(self, gradient: Tensor) -> None:
        def add() -> None:
            with torch.no_grad():
                self._add("gradients", _GRAD, gradient)
            self._taken.scale = self._grad_scale()

        if self._coming() == self._step:
            self._guarded(add)

    def _see_logit(self, largest: Tensor) -> None:
        self._raise_largest(_LOGIT, largest.double())

    def _see_route(self, chosen: Tensor) -> None:
        places = chosen.flatten()
        counts = torch.zeros(self.experts, dtype=torch.float64, device=chosen.device)
        counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.float64))
        self._taken.load = self._taken.load.to(chosen.device) + counts

    def _add(self, name: str, place: int, tensor: Tensor) -> None:
        sums, largest = measure(_local(tensor))
        setattr(self._taken, name, getattr(self._taken, name).to(sums.device) + sums)
        self._raise_largest(place, largest)

    def _raise_largest(self, place: int, value: Tensor) -> None:
        row = self._taken.largest.to(value.device)
        row[place] = torch.maximum(row[place], value)
        self._taken.largest = row


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if callable(to_local) else tensor


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """Yields the floating tensors of what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    parts = output.values() if isinstance(output, dict) else output
    if isinstance(parts, tuple | list) or isinstance(output, dict):
        for part in parts:
            yield from _tensors_in(part)


def _is_in_backward() -> bool:
    # torch has no public way to ask; -1 outside of a backward pass.
    return bool(torch._C._current_graph_task_id() != -1)


def find_watched(
    model: nn.Module,
    patterns: Sequence[str],
    coming: Callable[[], int | None],
    guard: Guard,
    **options: Any,
) -> list[Watched]:
    """Hooks the blocks of a model, and further modules; its children if it has no blocks.

    Args:
        model: the model.
        patterns: names of further modules.
        coming: see `Watched`.
        guard: see `Watched`.
        **options: see `Watched`.
    """
    modules = {strip_wrappers(name): module for name, module in model.named_modules() if name}
    parameters = tuple(strip_wrappers(name) for name, _ in model.named_parameters())
    scopes = {name: f"layer/{layer}" for name, layer in find_blocks(modules, parameters).items()}
    if not scopes:
        children = (
            name for name, child in model.named_children() if any(True for _ in child.parameters())
        )
        scopes = {strip_wrappers(name): f"module/{strip_wrappers(name)}" for name in children}
    for name in modules:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            scopes.setdefault(name, f"module/{name}")
    return [
        Watched(modules[name], scope, coming, guard, **options) for name, scope in scopes.items()
    ]

"""Sees gradients that are still there when the next step's backward pass adds to them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo
from ulysses_monitor.engines import Engine

__all__ = ["CarriedGradients"]

_FLAG, _KNOWN = "carried", "carried known"

_ENGINES = ("plain", "ddp")
"""Engines that leave it to the training to clear gradients, and keep them in ``param.grad``."""


class CarriedGradients:
    """Looks at one parameter: has anything written to its gradient since the step that used it?

    A tensor counts what is written to it. If its gradient is the same object, at the same count, as
    right after the optimizer's step when the next backward pass reaches it, nobody has cleared it.

    Args:
        engine: what is trained.
        guard: keeps a failure here out of the backward pass.

    Attributes:
        SUMS: names of what `take_sums` returns.
        passes: backward passes since the last step, from the second step on.
    """

    SUMS = (_FLAG, _KNOWN)

    def __init__(self, engine: Engine, guard: Guard) -> None:
        self._engine, self._guard = engine, guard
        self._param: Tensor | None = None
        self._undo: Undo | None = None
        self._used: tuple[int, int] | None = None
        self._is_first = False
        self.passes = 0
        self._found: Tensor | float = 0.0
        self._known = 0.0

    def end_step(self) -> None:
        """Remembers the gradient that the optimizer's step used."""
        if self._engine.name not in _ENGINES:
            return
        if self._param is None or not self._param.requires_grad:
            self._choose()
        grad = None if self._param is None else self._param.grad
        self._used = None if grad is None else (id(grad), grad._version)
        self._is_first, self.passes = True, 0

    def _choose(self) -> None:
        """Chooses the smallest parameter that has a gradient."""
        self.close()
        held = [p for p in self._engine.model.parameters() if p.grad is not None]
        self._param = min(held, key=Tensor.numel, default=None)
        if self._param is not None:
            self._undo = self._param.register_hook(self._see).remove

    def close(self) -> None:
        """Removes the hook."""
        if self._undo is not None:
            self._undo()
        self._param = self._undo = None

    def _see(self, _: Tensor) -> None:
        """Looks at what a backward pass is about to add to."""
        self.passes += 1
        if self._is_first:
            self._is_first = False
            self._guard.call("looking for gradients that were not cleared", self._look, None)

    def _look(self) -> None:
        grad = None if self._param is None else self._param.grad
        self._known, self._found = 1.0, 0.0
        if grad is not None and (id(grad), grad._version) == self._used:
            with torch.no_grad():  # an optimizer may have cleared it within its step
                self._found = (grad.count_nonzero() > 0).double()

    def take_sums(self) -> dict[str, Tensor | float]:
        """Returns what this rank saw of the step, the same names on all ranks."""
        sums = {_FLAG: self._found, _KNOWN: self._known}
        self._found = self._known = 0.0
        return sums

    @staticmethod
    def metrics(sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the share of ranks whose gradients were added to those of the step before."""
        known, flag = sums[_KNOWN], sums[_FLAG]
        return {"grad/carried/total": flag / known} if known > 0 and math.isfinite(flag) else {}

"""Controls the optimizer's update: skips it, freezes a part of it, or restores older weights.

All of it happens around the innermost ``optimizer.step()``. An optimizer leaves a tensor without a
gradient alone, with its state and its step count, so an update is skipped by removing the gradients
for that moment. Weights that are restored there, in the tensors that the optimizer updates, reach
all others as every update does: DeepSpeed makes its low-precision copies and gathers them after
this step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.engines import Engine, Shard
from ulysses_monitor.engines.support import defer
from ulysses_monitor.steering.acting.snapshot import Snapshot, local_part, updated_tensors

__all__ = ["UpdateGate"]

logger = logging.getLogger(__name__)


class UpdateGate:
    """Stands around the optimizer's step; each order counts for one step.

    Args:
        engine: the engine whose optimizer it guards.

    Attributes:
        has_failed: whether an order could not be carried out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._skips = False
        self._frozen: list[Shard] = []
        self._snapshot: Snapshot | None = None
        self._removed: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._entered = False
        self.has_failed = False

    @property
    def is_closed(self) -> bool:
        """Whether the coming update is skipped as a whole."""
        return self._skips or self._snapshot is not None

    def skip(self) -> None:
        """Skips the coming update."""
        self._skips = True

    def freeze(self, parameters: Collection[int]) -> None:
        """Keeps parameters and their optimizer state as they are.

        Args:
            parameters: their indices in the engine's list.
        """
        # Within the step DeepSpeed shows its optimizer one group at a time.
        self._frozen += [s for s in self._engine.shards() if s.index in parameters]

    def roll_back(self, snapshot: Snapshot) -> None:
        """Restores a snapshot instead of making the coming update."""
        self._snapshot = snapshot

    def reset(self) -> None:
        """Drops all orders; called when the step is over."""
        self._skips, self._frozen, self._snapshot = False, [], None
        self._copied.clear()
        self._entered = False

    def install(self, hook: Callable[[], Undo]) -> Undo:
        """Installs the gate around what `hook` hooks to the optimizer's step.

        Args:
            hook: adds the hooks that decide before the step and read it afterwards.

        Returns:
            A function that removes both.
        """
        optimizer = self._engine.optimizer
        # Hooks run in the order they were added: before the step they decide and then the gate
        # closes; after it the gate opens and then they read.
        after = optimizer.register_step_post_hook(lambda *_: self._guarded(self._after))
        undo = hook()
        before = optimizer.register_step_pre_hook(
            lambda _, args, kwargs: defer(lambda: self._guarded(self._before), args, kwargs)
        )
        return lambda: undo_all([before.remove, undo, after.remove])

    def _guarded(self, call: Callable[[], None]) -> None:
        """Keeps a failure from ending the training; ranks may differ then, so it is remembered."""
        try:
            with torch.no_grad():
                call()
        except Exception:
            self.has_failed = True
            logger.exception("monitor: the optimizer's update could not be held back")

    def _before(self) -> None:
        """ZeRO-3 steps once for each of its groups: copies are made at the first."""
        first, self._entered = not self._entered, True
        if self._snapshot is not None and first:
            self._snapshot.restore(self._engine)
        if self.is_closed:
            self._remove_gradients(updated_tensors(self._engine.optimizer))
        elif self._frozen:
            self._freeze(first)

    def _remove_gradients(self, params: Iterable[Tensor]) -> None:
        for param in params:
            if param.grad is not None:  # another monitor's gate may hold it
                self._removed.append((param, param.grad))
                param.grad = None

    def _freeze(self, first: bool) -> None:
        """Removes the gradients of frozen tensors; copies tensors that are part of a flat one."""
        of_optimizer = {
            _memory_of(local_part(p)): p for p in updated_tensors(self._engine.optimizer)
        }
        for shard in self._frozen:
            param = of_optimizer.get(_memory_of(shard.param))
            if param is not None:
                self._remove_gradients([param])
            elif first:
                held = (shard.param, *shard.state.values())
                self._copied += [(tensor, tensor.clone()) for tensor in held]

    def _after(self) -> None:
        for tensor, copy in self._copied:
            tensor.copy_(copy)
        # Some engines keep a gradient's tensor from step to step.
        for param, grad in self._removed:
            param.grad = grad
        self._removed.clear()


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    """Returns address and size, which identify a shard among the optimizer's tensors."""
    return tensor.data_ptr(), tensor.numel()

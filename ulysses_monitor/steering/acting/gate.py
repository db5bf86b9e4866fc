"""What becomes of the optimizer's update: left out, undone in part, or replaced by older weights.

All of it happens around the innermost ``optimizer.step()``. An optimizer leaves a tensor alone
that has no gradient, with its state and its step count, so an update is left out by taking the
gradients away for that moment. Weights that are put back there, in the tensors that the optimizer
updates, reach all others as every update does: DeepSpeed makes its low-precision copies and
gathers them after this step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.engines import Engine, Shard

__all__ = ["Snapshot", "UpdateGate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Weights and optimizer state of this rank, in the host's memory.

    Attributes:
        step: the last optimizer step that is in it.
        weights: of each tensor that the optimizer updates, by `id`.
        state: the optimizer's, by `id` of the tensor.
        buffers: the model's.
    """

    step: int
    weights: dict[int, Tensor]
    state: dict[int, dict[str, Any]]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, engine: Engine, step: int) -> Snapshot:
        """Copies what this rank holds as it is now."""
        optimizer = engine.optimizer
        updated = list(_updated(optimizer))
        return cls(
            step,
            {id(p): _copy(p) for p in updated},
            {
                id(p): {k: _copy(v) if isinstance(v, Tensor) else v for k, v in state.items()}
                for p, state in optimizer.state.items()
            },
            {name: _copy(buffer) for name, buffer in engine.model.named_buffers()},
        )

    def restore(self, engine: Engine) -> None:
        """Puts it back in place; state that came to be after it goes."""
        optimizer = engine.optimizer
        for param in _updated(optimizer):
            if id(param) in self.weights:
                _local(param).copy_(self.weights[id(param)])
        for param in list(optimizer.state):
            kept = self.state.get(id(param))
            if kept is None:
                del optimizer.state[param]
                continue
            held = optimizer.state[param]
            for name in set(held) - set(kept):
                del held[name]
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    _local(held[name]).copy_(value)
                else:
                    held[name] = value
        for name, buffer in engine.model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])


class UpdateGate:
    """Stands around the optimizer's step; what it is told counts for one step.

    Args:
        engine: whose optimizer.

    Attributes:
        failed: whether it could not do what it was told.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._skips = False
        self._frozen: list[Shard] = []
        self._snapshot: Snapshot | None = None
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._entered = False
        self.failed = False

    @property
    def closed(self) -> bool:
        """Whether the coming update is left out as a whole."""
        return self._skips or self._snapshot is not None

    def skip(self) -> None:
        """Leaves the coming update out."""
        self._skips = True

    def freeze(self, parameters: Collection[int]) -> None:
        """Keeps parameters, by their place in the engine's list, and their state as they are."""
        # Within the step DeepSpeed shows its optimizer one group at a time.
        self._frozen += [s for s in self._engine.shards() if s.index in parameters]

    def roll_back(self, snapshot: Snapshot) -> None:
        """Puts a snapshot in the place of the coming update."""
        self._snapshot = snapshot

    def opened(self) -> None:
        """The step is over: nothing is held any more."""
        self._skips, self._frozen, self._snapshot = False, [], None
        self._kept.clear()
        self._entered = False

    def place(self, hook: Callable[[], Undo]) -> Undo:
        """Places the gate around what `hook` hooks to the optimizer's step.

        Args:
            hook: hooks whoever decides before the step, and looks at it after.

        Returns:
            What takes both away.
        """
        optimizer = self._engine.optimizer
        # Hooks run in the order they came: first those before the step decide, then the gate
        # shuts; after it the gate opens, and then they look.
        after = optimizer.register_step_post_hook(lambda *_: self._guarded(self._after))
        undo = hook()
        before = optimizer.register_step_pre_hook(lambda *_: self._guarded(self._before))
        return lambda: undo_all([before.remove, undo, after.remove])

    def _guarded(self, call: Callable[[], None]) -> None:
        """A defect here must not end the training; what it left undone makes ranks differ."""
        try:
            with torch.no_grad():
                call()
        except Exception:
            self.failed = True
            logger.exception("monitor: the update could not be held")

    def _before(self) -> None:
        """ZeRO-3 steps once for each of its groups: what is copied is copied at the first."""
        first, self._entered = not self._entered, True
        if self._snapshot is not None and first:
            self._snapshot.restore(self._engine)
        if self.closed:
            self._take_aside(_updated(self._engine.optimizer))
        elif self._frozen:
            self._hold(first)

    def _take_aside(self, params: Iterable[Tensor]) -> None:
        for param in params:
            if param.grad is not None:  # another monitor's gate may hold it
                self._aside.append((param, param.grad))
                param.grad = None

    def _hold(self, first: bool) -> None:
        """Frozen tensors get no gradient; where they are a part of a flat one, they are kept."""
        of_optimizer = {_place(_local(p)): p for p in _updated(self._engine.optimizer)}
        for shard in self._frozen:
            param = of_optimizer.get(_place(shard.param))
            if param is not None:
                self._take_aside([param])
            elif first:
                held = (shard.param, *shard.state.values())
                self._kept += [(tensor, tensor.clone()) for tensor in held]

    def _after(self) -> None:
        for tensor, kept in self._kept:
            tensor.copy_(kept)
        # Some engines keep a gradient's tensor from step to step.
        for param, grad in self._aside:
            param.grad = grad
        self._aside.clear()


def _updated(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors that the optimizer updates, each once; ZeRO-3 lists them with its state only."""
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    yield from {id(p): p for p in [*groups, *optimizer.state]}.values()


def _local(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def _copy(tensor: Tensor) -> Tensor:
    return _local(tensor).to("cpu", copy=True)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()

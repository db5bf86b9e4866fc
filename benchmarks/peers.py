"""How others read gradients, written as is usual for each; `benchmarks/capture.py` times them.

All get the gradients that this process holds at the same moment, and compute each one's norm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "BackwardHooks",
    "WandbWatch",
    "composer_style",
    "free_folder",
    "item_loop",
    "olmo_style",
    "read_once",
    "safe_get_full_grad_loop",
]

Sync = Callable[[], None]


def read_once(grads: Sequence[Tensor]) -> None:
    """Reads every gradient once with torch's fastest kernel and keeps nothing: the limit."""
    torch._foreach_norm(list(grads))


def item_loop(grads: Sequence[Tensor]) -> dict[int, float]:
    """Loops over this rank's parameters with ``.item()``, as most scripts do."""
    return {i: grad.norm().item() for i, grad in enumerate(grads)}


def composer_style(grads: Sequence[Tensor]) -> dict[int, float]:
    """Works as Composer's OptimizerMonitor: a norm, an all-reduce, an ``.item()`` per parameter."""
    norms = {i: torch.linalg.vector_norm(grad) ** 2 for i, grad in enumerate(grads)}
    if dist.is_initialized() and dist.get_world_size() > 1:
        for square in norms.values():
            dist.all_reduce(square)
    return {i: square.sqrt().item() for i, square in norms.items()}


def olmo_style(grads: Sequence[Tensor]) -> Tensor:
    """Works as OLMo's optimizer: minima, maxima, means and norms; three collectives, one copy."""
    magnitudes = [grad.abs() for grad in grads]
    lows = torch.stack([m.min() for m in magnitudes])
    highs = torch.stack([m.max() for m in magnitudes])
    sums = torch.stack([grad.sum() for grad in grads])
    squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) ** 2 for g in grads])
    both = torch.cat([sums, squares])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.reduce(lows, 0, op=dist.ReduceOp.MIN)
        dist.reduce(highs, 0, op=dist.ReduceOp.MAX)
        dist.reduce(both, 0, op=dist.ReduceOp.SUM)
    return torch.cat([lows, highs, both]).cpu()


class BackwardHooks:
    """A hook per parameter with ``.item()``; wrong, as it runs before reduction.

    Only the hooks' own time is taken, after what the backward pass had queued before them.
    """

    def __init__(self, model: nn.Module, sync: Sync) -> None:
        self.seconds = 0.0
        self._sync = sync
        self._handles = [p.register_hook(self._look) for p in model.parameters() if p.requires_grad]

    def _look(self, grad: Tensor) -> None:
        self._sync()
        began = time.perf_counter()
        grad.norm().item()
        self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


class WandbWatch:
    """``wandb.watch(model, log_freq=1)``, offline; times its hooks and ``wandb.log``."""

    def __init__(self, model: nn.Module, sync: Sync) -> None:
        import wandb
        from wandb.integration.torch import wandb_torch

        self.seconds = 0.0
        self._sync, self._wandb, self._model = sync, wandb, model
        self._folder = tempfile.TemporaryDirectory()
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(mode="offline", dir=self._folder.name, settings=settings)
        self._history: Any = wandb_torch.TorchHistory
        self._original = self._history.log_tensor_stats
        watch = self

        def timed(history: Any, *args: Any, **kwargs: Any) -> Any:
            sync()
            began = time.perf_counter()
            result = watch._original(history, *args, **kwargs)
            watch.seconds += time.perf_counter() - began
            return result

        self._history.log_tensor_stats = timed
        wandb.watch(model, log="gradients", log_freq=1)

    def log(self) -> None:
        """Times a step's ``wandb.log`` with the histograms that the hooks left."""
        began = time.perf_counter()
        self._wandb.log({"loss": 1.0})
        self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """Ends the run."""
        self._wandb.unwatch(self._model)
        self._history.log_tensor_stats = self._original
        self._run.finish()
        self._folder.cleanup()


def safe_get_full_grad_loop(model: nn.Module) -> dict[int, float]:
    """Gathers the whole gradient of each parameter on each rank, as DeepSpeed documents it."""
    from deepspeed.utils import safe_get_full_grad

    named = [p for p in model.parameters() if p.requires_grad]
    return {i: safe_get_full_grad(p).norm().item() for i, p in enumerate(named)}


def free_folder() -> Path:
    """Makes a new temporary folder."""
    return Path(tempfile.mkdtemp(prefix="capture-"))

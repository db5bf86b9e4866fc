"""Plain torch and DistributedDataParallel: whole parameters, gradients alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ulysses_monitor.engines.base import Shard, trainable_parameters
from ulysses_monitor.errors import InputError
from ulysses_monitor.patching import Undo

__all__ = ["PlainEngine"]


class PlainEngine:
    """A model and a `torch.optim.Optimizer`, on one process or replicated by DDP.

    Replicas hold the same gradients after DDP's reduction, so the ranks share the reading:
    each reads a part of the parameters of about equal size, none is read twice.

    Args:
        model: the model, or the DDP module around it.
        optimizer: the optimizer that owns the parameters.
        grad_scale: gives the loss scale where a `GradScaler` is used.
        clip_norm: gives the norm that the caller will clip to, for `grad/clip_coef/total`.

    Raises:
        InputError: the model has no trainable parameter, or is sharded (FSDP).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_scale: Callable[[], float] | None = None,
        clip_norm: Callable[[], float | None] | None = None,
    ) -> None:
        replicated = isinstance(model, nn.parallel.DistributedDataParallel)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        self.name = "ddp" if replicated else "plain"
        self.optimizer = optimizer
        self.grad_scale = grad_scale or (lambda: 1.0)
        self.clip_norm = clip_norm or (lambda: None)
        named = trainable_parameters(model)
        if not named:
            raise InputError("monitor: the model has no trainable parameter, so nothing to watch")
        if any(hasattr(p, "device_mesh") for _, p in named):
            raise InputError(
                "monitor: the model's parameters are sharded (FSDP2); "
                "supported engines are plain torch, DDP and DeepSpeed ZeRO-1/2"
            )
        self._named = named
        self.device = named[0][1].device
        self._own = _own_share([p.numel() for _, p in named], replicated)

    def parameters(self) -> list[tuple[str, int]]:
        """See `Engine.parameters`."""
        return [(name, p.numel()) for name, p in self._named]

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        for i in self._own:
            param = self._named[i][1]
            state = self.optimizer.state.get(param, {})
            tensors = {k: v for k, v in state.items() if _is_like(v, param)}
            yield Shard(i, 0, param.detach(), param.grad, tensors)

    def learning_rates(self) -> list[float]:
        """See `Engine.learning_rates`."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def hook_step(self, before: Callable[[], None], after: Callable[[], None]) -> Undo:
        """Hooks `optimizer.step()`; callers that clip do so earlier, see `Monitor.before_clip`."""
        pre = self.optimizer.register_step_pre_hook(lambda *_: before())
        post = self.optimizer.register_step_post_hook(lambda *_: after())

        def undo() -> None:
            pre.remove()
            post.remove()

        return undo


def _is_like(value: object, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == param.shape


def _own_share(numels: list[int], replicated: bool) -> list[int]:
    """Indices of the parameters that this rank reads: largest first to the least loaded rank."""
    if not replicated:
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return []  # replicas that some other means keeps alike: rank 0 speaks for all
        return list(range(len(numels)))
    load, own = [0] * dist.get_world_size(), []
    for i in sorted(range(len(numels)), key=lambda i: -numels[i]):
        rank = load.index(min(load))
        load[rank] += numels[i]
        if rank == dist.get_rank():
            own.append(i)
    return sorted(own)

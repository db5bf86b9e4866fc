"""DistributedDataParallel: whole parameters, and gradients alike on all ranks after reduction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.base import Replica, assign_parameters, check_spans_world, unwrap
from ulysses_monitor.engines.plain import PlainEngine

__all__ = ["DDPEngine", "is_ddp"]


def is_ddp(model: nn.Module) -> bool:
    """Whether `model` is a `DistributedDataParallel` module, compiled or not."""
    return isinstance(_ddp(model), nn.parallel.DistributedDataParallel)


class DDPEngine(PlainEngine):
    """Replicas hold the same after DDP's reduction, so the ranks share the reading.

    Each rank counts a part of the parameters of about equal size; none is counted twice.

    Args:
        model: the DDP module.
        optimizer: the optimizer that owns the parameters.
        **options: as `PlainEngine`'s.

    Raises:
        InputError: the model has no trainable parameter, spans a part of the ranks only, or its
            optimizer state is sharded.
    """

    name = "ddp"
    replica_sets = 1

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.group: dist.ProcessGroup = _ddp(model).process_group
        check_spans_world(self.group, "DistributedDataParallel")
        if any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__):
            raise InputError(
                "monitor: ZeroRedundancyOptimizer is not supported; allowed with "
                "DistributedDataParallel is an optimizer whose state every rank holds"
            )
        super().__init__(unwrap(model), optimizer, **options)

    def counted_indices(self) -> list[int]:
        """See `Engine.counted_indices`."""
        numels = [p.numel() for _, p in self._named]
        return assign_parameters(numels, dist.get_world_size(self.group), dist.get_rank(self.group))

    def replicas(self) -> Iterator[Replica]:
        """See `Engine.replicas`."""
        for i, (_, param) in enumerate(self._named):
            yield Replica(i, param.detach(), param.grad)


def _ddp(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)

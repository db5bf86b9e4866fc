"""DistributedDataParallel: every rank holds full parameters and the same reduced gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.base import Replica
from ulysses_monitor.engines.plain import PlainEngine
from ulysses_monitor.engines.support import assign_parameters, check_spans_world, unwrap

__all__ = ["DDPEngine", "is_ddp"]


def is_ddp(model: nn.Module) -> bool:
    """Whether `model` is a `DistributedDataParallel` module, compiled or not."""
    return isinstance(_uncompile(model), nn.parallel.DistributedDataParallel)


class DDPEngine(PlainEngine):
    """View of a DDP module: the ranks share the reading, because all hold the same.

    Each rank counts about as many elements as any other; no parameter is counted twice.

    Args:
        model: the DDP module.
        optimizer: the optimizer that owns the parameters.
        **options: see `PlainEngine`.

    Raises:
        InputError: the model has no trainable parameters, DDP spans only some of the ranks, or
            the optimizer state is sharded.
    """

    name = "ddp"
    replica_sets = 1

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.group: dist.ProcessGroup = _uncompile(model).process_group
        check_spans_world(self.group, "DistributedDataParallel")
        if any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__):
            raise InputError(
                "monitor: the optimizer is a ZeroRedundancyOptimizer; expected an optimizer that "
                "keeps all of its state on every rank"
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


def _uncompile(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)

"""FSDP2 (``fully_shard``): each rank holds rows of every parameter, as a DTensor.

``p.grad.norm()`` of a DTensor gives the norm of this rank's rows alone. The view reads the rows
through ``to_local``, so that the probes can add up their sums over ranks. Under HSDP (a mesh of
replicas of shards) the replicas share the reading.

Legend: N rows of a parameter, W ranks; a rank holds [N/W, ...] of [N, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.base import Replica, Shard
from ulysses_monitor.engines.plain import PlainEngine, step_count
from ulysses_monitor.engines.support import (
    assign_parameters,
    check_spans_world,
    select_state,
    trainable_parameters,
    unwrap,
)

__all__ = ["FSDPEngine", "is_fsdp", "refuse_fsdp1"]


def is_fsdp(model: nn.Module) -> bool:
    """Whether a trainable parameter of `model` is a DTensor."""
    return any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuses FSDP1, whose flat parameters hide those of the model.

    Raises:
        InputError: a module is a `FullyShardedDataParallel`.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InputError(
            "monitor: the model uses FullyShardedDataParallel (FSDP1), which is not supported; "
            "use fully_shard (FSDP2; in accelerate fsdp_version: 2)"
        )


class FSDPEngine(PlainEngine):
    """View of a model under ``fully_shard``: FSDP or HSDP, with or without CPU offload.

    Args:
        model: the model.
        optimizer: the optimizer, built after sharding.
        **options: see `PlainEngine`.

    Raises:
        InputError: a parameter is not sharded by rows over all ranks.
    """

    name = "fsdp2"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        named = trainable_parameters(unwrap(model))
        self._check_trained(named)
        mesh = named[0][1].device_mesh  # type: ignore[attr-defined]
        self.group: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        if mesh.size() != dist.get_world_size():
            check_spans_world(mesh.get_group(), "fully_shard's mesh")
        coordinate = mesh.get_coordinate()
        self._replicas = int(mesh.size(0)) if mesh.ndim == 2 else 1
        self._replica = int(coordinate[0]) if mesh.ndim == 2 else 0
        if self._replicas > 1:
            self.replica_sets, self.replica_set = mesh.size(1), coordinate[1]
            self.name = "hsdp2"
        super().__init__(model, optimizer, **options)
        self.device = torch.device(mesh.device_type)

    def _check_trained(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        for name, param in named:
            _check_placement(name, param)

    def _arrange(self) -> None:
        super()._arrange()
        self._offsets = [_offset(param) for _, param in self._named]

    def counted_indices(self) -> list[int]:
        """See `Engine.counted_indices`."""
        own = assign_parameters([p.numel() for _, p in self._named], self._replicas, self._replica)
        return [i for i in own if _local(self._named[i][1]).numel()]

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        for i, (_, param) in enumerate(self._named):
            local = _local(param)
            if not local.numel():
                continue
            state = self.optimizer.state.get(param, {})
            tensors = {k: _local(v) for k, v in state.items() if isinstance(v, DTensor)}
            yield Shard(
                i,
                self._offsets[i],
                local,
                None if param.grad is None else _local(param.grad),
                select_state(tensors, local),
                self._settings.get(param, {}),
                step_count(state),
                is_counted=i in self._counted,
                has_state=bool(state),
            )

    def replicas(self) -> Iterator[Replica]:
        """See `Engine.replicas`; only HSDP has replicas."""
        if self._replicas > 1:
            for shard in self.shards():
                yield Replica(shard.index, shard.param, shard.grad)

    def full_parameter(self, param: nn.Parameter) -> Tensor | None:
        """See `Engine.full_parameter`."""
        return None if isinstance(param, DTensor) else param.detach()

    def local_parameter(self, param: nn.Parameter) -> Tensor:
        """See `Engine.local_parameter`."""
        return _local(param)


def _check_placement(name: str, param: nn.Parameter) -> None:
    placements = list(param.placements) if isinstance(param, DTensor) else None
    if placements not in ([Sharded(0)], [Replicate(), Sharded(0)]):
        raise InputError(
            f"monitor: parameter {name} is placed as {placements or 'a plain tensor'}; expected "
            "rows over all ranks, by fully_shard: [Shard(0)] or [Replicate(), Shard(0)]"
        )


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's rows [N/W, ...], sharing their storage with the DTensor [N, ...]."""
    local = tensor.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def _offset(param: Any) -> int:
    """Returns where this rank's rows start in the flattened parameter, in elements."""
    _, starts = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return int(starts[0] * (param.numel() // param.shape[0]))

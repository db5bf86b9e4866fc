"""ZeRO-3, with or without CPU offload of the optimizer and of the parameters.

Each rank holds ``ds_tensor``, an equal part of the flattened parameter; the last parts are padded.
The optimizer's fp32 parts lie in flat sub-groups at ``grad_position``. Reading them needs no
communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.engines.base import Replica, Shard
from ulysses_monitor.engines.deepspeed.common import DeepSpeedView, refuse_untrained
from ulysses_monitor.engines.plain import step_count
from ulysses_monitor.engines.support import select_state

__all__ = ["Zero3Engine"]


class Zero3Engine(DeepSpeedView):
    """View of a `deepspeed.DeepSpeedEngine` that runs ZeRO stage 3.

    Args:
        engine: the DeepSpeed engine.
    """

    replica_sets = 0

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._rank = dist.get_rank(self.group)
        self._place = {
            param.ds_id: (group, j)
            for group, params in enumerate(self._zero.fp16_groups)
            for j, param in enumerate(params)
        }

    def _check_trained(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        refuse_untrained([name for name, p in named if _ds(p).ds_id not in self._place])

    def _numel(self, param: nn.Parameter) -> int:
        return int(_ds(param).ds_numel)

    def shapes(self) -> list[torch.Size]:
        """See `Engine.shapes`."""
        return [torch.Size(_ds(p).ds_shape) for _, p in self._named]

    def counted_indices(self) -> list[int]:
        """See `Engine.counted_indices`."""
        return [i for i, (_, p) in enumerate(self._named) if self._span(p)[1]]

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        zero = self._zero
        for i, (_, param) in enumerate(self._named):
            offset, numel = self._span(param)
            if not numel:
                continue
            group, start, _ = zero.grad_position[zero.get_param_id(param)]
            flat = zero.fp32_partitioned_groups_flat[group]
            state = self.optimizer.state.get(flat, {})
            yield Shard(
                i,
                offset,
                flat.detach().narrow(0, start, numel),
                self._gradient(param, group, start, numel),
                {k: v.narrow(0, start, numel) for k, v in select_state(state, flat).items()},
                self.optimizer.param_groups[zero.sub_group_to_group_id[group]],
                step_count(state),
                has_state=bool(state),
            )

    def _gradient(self, param: Any, group: int, start: int, numel: int) -> Tensor | None:
        if self._zero.offload_optimizer:
            grad = self._zero.fp32_partitioned_groups_flat[group].grad
            return None if grad is None else grad.narrow(0, start, numel)
        grads = self._zero.averaged_gradients.get(group)
        if grads is None:
            return None
        return grads[self._place[param.ds_id][1]].view(-1).narrow(0, 0, numel)  # type: ignore[no-any-return]

    def _span(self, param: nn.Parameter) -> tuple[int, int]:
        """Returns where this rank's part starts, and its elements without padding."""
        part = int(_ds(param).ds_tensor.ds_numel)
        offset = part * self._rank
        return offset, max(0, min(part, int(_ds(param).ds_numel) - offset))

    def replicas(self) -> Iterator[Replica]:
        """See `Engine.replicas`."""
        return iter(())

    def full_parameter(self, param: nn.Parameter) -> Tensor | None:
        """See `Engine.full_parameter`."""
        return None if hasattr(param, "ds_tensor") else param.detach()

    def local_parameter(self, param: nn.Parameter) -> Tensor:
        """See `Engine.local_parameter`."""
        _, numel = self._span(param)
        return _ds(param).ds_tensor.detach().view(-1).narrow(0, 0, numel)  # type: ignore[no-any-return]

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """See `Engine.set_gradient`; also updates the norm that offload keeps for clipping."""
        super().set_gradient(shard, value)
        if self._zero.offload_optimizer and shard.grad is not None:
            param_id = self._zero.get_param_id(self._named[shard.index][1])
            self._zero.norm_for_param_grads[param_id] = shard.grad.double().norm()


def _ds(param: nn.Parameter) -> Any:
    """Returns `param` untyped, because DeepSpeed adds attributes to it."""
    return param

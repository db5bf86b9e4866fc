"""ZeRO-0: nothing is sharded; DeepSpeed averages ``param.grad`` over the ranks before a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.engines.base import Replica, Shard
from ulysses_monitor.engines.deepspeed.common import DeepSpeedView, refuse_untrained
from ulysses_monitor.engines.plain import full_shards, step_count
from ulysses_monitor.engines.support import assign_parameters, select_state

__all__ = ["MasterWeightsEngine", "Zero0Engine"]


class Zero0Engine(DeepSpeedView):
    """View of ZeRO-0 in fp32, where the optimizer updates the model's own parameters.

    Args:
        engine: the DeepSpeed engine.
    """

    replicates_gradients = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._arrange()

    def _arrange(self) -> None:
        groups = self.optimizer.param_groups
        self._settings = {param: group for group in groups for param in group["params"]}
        self._counted = frozenset(self.counted_indices())

    def counted_indices(self) -> list[int]:
        """See `Engine.counted_indices`; the ranks share the reading, as under DDP."""
        numels = [p.numel() for _, p in self._named]
        if self.group is None:
            return list(range(len(numels)))
        return assign_parameters(numels, dist.get_world_size(self.group), dist.get_rank(self.group))

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        return full_shards(self._named, self.optimizer, self._settings, self._counted)

    def replicas(self) -> Iterator[Replica]:
        """See `Engine.replicas`."""
        for i, (_, param) in enumerate(self._named):
            yield Replica(i, param.detach(), param.grad)

    def grad_scale(self) -> Tensor | float:
        """See `Engine.grad_scale`."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        return float(scaler.get_scale()) if scaler is not None else 1.0


class MasterWeightsEngine(Zero0Engine):
    """View of ZeRO-0 in bf16 and fp16, where the optimizer updates fp32 master weights.

    DeepSpeed keeps them one by one, or flattened by parameter group.

    Args:
        engine: the DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._masters = _find_masters(self._zero)

    def _check_trained(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        refuse_untrained([name for name, p in named if p not in self._masters])

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        for i, (_, param) in enumerate(self._named):
            if param not in self._masters:
                continue
            owner, start, settings = self._masters[param]
            state = self.optimizer.state.get(owner, {})
            yield Shard(
                i,
                0,
                _slice(owner.detach(), start, param),
                param.grad,
                {k: _slice(v, start, param) for k, v in select_state(state, owner).items()},
                settings,
                step_count(state),
                is_counted=i in self._counted,
                has_state=bool(state),
            )

    def grad_scale(self) -> Tensor | float:
        """See `Engine.grad_scale`."""
        return float(self._zero.loss_scale_config.cur_scale)


def _find_masters(zero: Any) -> dict[Tensor, tuple[Tensor, int, Mapping[str, Any]]]:
    """Returns for each parameter: its fp32 tensor, its first element there, and its settings."""
    found: dict[Tensor, tuple[Tensor, int, Mapping[str, Any]]] = {}
    for i, (params, settings) in enumerate(
        zip(zero.fp16_groups, zero.optimizer.param_groups, strict=True)
    ):
        start = 0
        for j, param in enumerate(params):
            if hasattr(zero, "fp32_groups_flat"):
                found[param] = zero.fp32_groups_flat[i], start, settings
                start += param.numel()
            else:
                found[param] = zero.fp32_groups[i][j], 0, settings
    return found


def _slice(owner: Tensor, start: int, param: Tensor) -> Tensor:
    """Returns the part of a flat tensor that belongs to `param`: [*] -> shape of `param`."""
    return owner.view(-1).narrow(0, start, param.numel()).view(param.shape)

"""ZeRO-1 and ZeRO-2, with or without CPU offload of the optimizer.

DeepSpeed keeps ``_hp_mapping`` on each low-precision parameter: the fragment of the rank's flat
fp32 partition that belongs to the parameter, or None if this rank holds nothing of it. Reading the
fragments needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.base import Shard
from ulysses_monitor.engines.deepspeed.common import DeepSpeedView, refuse_untrained
from ulysses_monitor.engines.plain import step_count
from ulysses_monitor.engines.support import select_state

__all__ = ["Zero12Engine"]


class Zero12Engine(DeepSpeedView):
    """View of a `deepspeed.DeepSpeedEngine` that runs ZeRO stage 1 or 2.

    Args:
        engine: the DeepSpeed engine.

    Raises:
        InputError: the optimizer does not hold every trainable parameter.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        if missing := [name for name, p in self._named if not hasattr(p, "_hp_mapping")]:
            raise InputError(
                f"monitor: DeepSpeed's optimizer does not hold parameter {missing[0]}; expected "
                "every trainable parameter in the optimizer given to deepspeed.initialize"
            )
        # BF16_Optimizer keeps full gradients on every rank, and partitions everything else.
        self._full_gradients = hasattr(self._zero, "fp32_groups_gradients_flat")

    def _check_trained(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        refuse_untrained([name for name, p in named if not hasattr(p, "_hp_mapping")])

    def counted_indices(self) -> list[int]:
        """See `Engine.counted_indices`."""
        return [i for i, (_, p) in enumerate(self._named) if _mapping(p) is not None]

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        for i, (_, param) in enumerate(self._named):
            mapping = _mapping(param)
            if mapping is None:
                continue
            settings = self.optimizer.param_groups[mapping.param_group_index]
            flat, address = settings["params"][0], mapping.hp_fragment_address
            # Not mapping.optim_fragment: DeepSpeed links it for the first parameter group only.
            state = self.optimizer.state.get(flat, {})
            yield Shard(
                i,
                mapping.lp_fragment_address.start,
                mapping.hp_fragment.detach(),
                self._gradient(param, mapping),
                {k: v.narrow(0, *_span(address)) for k, v in select_state(state, flat).items()},
                settings,
                step_count(state),
                has_state=bool(state),
            )

    def _gradient(self, param: Any, mapping: Any) -> Tensor | None:
        try:
            grad = mapping.get_lp_grad_fragment(param._index_in_param_group)
        except ValueError:  # DeepSpeed raises this outside of backward to step
            return None
        if grad is None or not self._full_gradients:
            return grad  # type: ignore[no-any-return]
        return grad.view(-1).narrow(0, *_span(mapping.lp_fragment_address))  # type: ignore[no-any-return]

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """See `Engine.set_gradient`; also updates the norm that offload keeps for clipping."""
        super().set_gradient(shard, value)
        norms = getattr(self._zero, "norm_for_param_grads", None)
        if norms is not None and shard.grad is not None:
            param_id = self._zero.get_param_id(self._named[shard.index][1])
            norms[param_id] = shard.grad.double().norm()

    def commit_gradients(self) -> None:
        """See `Engine.commit_gradients`; makes full gradients the same on all ranks again."""
        if not self._full_gradients:
            return
        for flat, own in zip(
            self._zero.fp32_groups_gradients_flat,
            self._zero.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            dist.all_gather_into_tensor(flat, own.clone(), group=self.group)


def _span(address: Any) -> tuple[int, int]:
    """Returns start and number of elements."""
    return address.start, address.numel


def _mapping(param: nn.Parameter) -> Any:
    return getattr(param, "_hp_mapping", None)

"""DeepSpeed ZeRO-1 and ZeRO-2, with and without CPU offload of the optimizer.

The only file that knows DeepSpeed's private parts. ZeRO-1/2 keep, on each low-precision parameter,
``_hp_mapping``: the fragment of the rank's flat fp32 partition that belongs to it, or None where
this rank holds nothing of it. Reading those fragments needs no communication. The moment is the
entry of the ZeRO optimizer's own ``step``: gradients are reduced, unclipped and still multiplied
by the loss scale; a `TrainerCallback` is called only after it, when every gradient is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ulysses_monitor.engines.base import Shard, trainable_parameters
from ulysses_monitor.errors import InputError
from ulysses_monitor.patching import Undo, patch_method

__all__ = ["DeepSpeedEngine", "is_deepspeed_engine"]


def is_deepspeed_engine(model: object) -> bool:
    """Whether `model` is a `deepspeed.DeepSpeedEngine`; does not import DeepSpeed."""
    return any(
        c.__module__.startswith("deepspeed.") and c.__name__ == "DeepSpeedEngine"
        for c in type(model).__mro__
    )


class DeepSpeedEngine:
    """View of a `deepspeed.DeepSpeedEngine` that runs ZeRO stage 1 or 2.

    Raises:
        InputError: another ZeRO stage, or a DeepSpeed whose ZeRO optimizer is not known.
    """

    def __init__(self, engine: Any) -> None:
        stage = engine.zero_optimization_stage()
        if stage not in (1, 2):
            raise InputError(
                f"monitor: DeepSpeed ZeRO-{stage} is not supported; use ZeRO stage 1 or 2, "
                "or train without the monitor"
            )
        self.name = f"deepspeed-zero{stage}" + ("-offload" if engine.zero_cpu_offload() else "")
        self.device = engine.device
        self._zero = engine.optimizer
        self._named = trainable_parameters(engine.module)
        if not hasattr(self._zero, "averaged_gradients") or not all(
            hasattr(p, "_hp_mapping") for _, p in self._named
        ):
            import deepspeed

            raise InputError(
                f"monitor: DeepSpeed {deepspeed.__version__} keeps its ZeRO shards in a way that "
                "is not known; install a version from the range in pyproject.toml"
            )

    def parameters(self) -> list[tuple[str, int]]:
        """See `Engine.parameters`."""
        return [(name, p.numel()) for name, p in self._named]

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        for i, (_, param) in enumerate(self._named):
            shard = _shard(i, param)
            if shard is not None:
                yield shard

    def grad_scale(self) -> float:
        """See `Engine.grad_scale`."""
        return float(self._zero.loss_scale)

    def clip_norm(self) -> float | None:
        """See `Engine.clip_norm`."""
        return float(self._zero.clip_grad) or None

    def learning_rates(self) -> list[float]:
        """See `Engine.learning_rates`."""
        return [float(group["lr"]) for group in self._zero.param_groups]

    def hook_step(self, before: Callable[[], None], after: Callable[[], None]) -> Undo:
        """Wraps the ZeRO optimizer's `step` on the instance; it runs at boundaries only."""

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before()
            result = original(*args, **kwargs)
            after()
            return result

        return patch_method(self._zero, "step", step)


def _shard(index: int, param: nn.Parameter) -> Shard | None:
    """The part of `param` in this rank's partition, or None where it holds nothing of it."""
    mapping: Any = getattr(param, "_hp_mapping", None)
    if mapping is None:
        return None
    grad = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
    state = dict(mapping.optim_fragment or {})
    return Shard(index, mapping.lp_fragment_address.start, mapping.hp_fragment, grad, state)

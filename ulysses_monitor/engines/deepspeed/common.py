"""What the views of all ZeRO stages have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.engines.base import AdamUpdate, Replica, StepCallback, do_nothing
from ulysses_monitor.engines.parameter_view import ParameterView
from ulysses_monitor.engines.support import own_step

__all__ = ["DeepSpeedView", "refuse_untrained"]

_ADAM_STEPS = {
    ("deepspeed.ops.adam.fused_adam", "FusedAdam.step"),
    ("deepspeed.ops.adam.cpu_adam", "DeepSpeedCPUAdam.step"),
}
"""Module and name of the steps of DeepSpeed's own Adam."""


class DeepSpeedView(ParameterView):
    """Base of the views of a `deepspeed.DeepSpeedEngine`.

    Args:
        engine: the DeepSpeed engine.

    Raises:
        InputError: the model has no trainable parameters.
    """

    replica_sets = 1
    replica_set = 0
    clips_in_step = True
    replicates_gradients = False

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.module, engine.basic_optimizer)
        self._engine = engine
        self._zero = engine.optimizer
        self.device: torch.device = engine.device
        self.group: dist.ProcessGroup | None = (
            engine.seq_data_parallel_group if dist.is_initialized() else None
        )
        self.name = f"deepspeed-zero{engine.zero_optimization_stage()}" + _offload_suffix(engine)

    def _holds(self) -> list[list[int]]:
        return []  # DeepSpeed makes its own groups once

    def replicas(self) -> Iterator[Replica]:
        """See `Engine.replicas`; below ZeRO-3 every rank holds the parameters it computes with."""
        for i, (_, param) in enumerate(self._named):
            yield Replica(i, param.detach(), None)

    def grad_scale(self) -> Tensor | float:
        """See `Engine.grad_scale`; 1 under BF16_Optimizer, which has no loss scale."""
        return float(getattr(self._zero, "loss_scale", 1.0))

    def clip_norm(self) -> float | None:
        """See `Engine.clip_norm`."""
        return float(self._engine.gradient_clipping() or math.inf)

    def adam_update(self, settings: Mapping[str, Any]) -> AdamUpdate | None:
        """See `Engine.adam_update`; also knows DeepSpeed's own Adam, on the GPU and on the CPU."""
        step: Any = own_step(type(self.optimizer))
        name = getattr(step, "__module__", ""), getattr(step, "__qualname__", "")
        if name in _ADAM_STEPS:
            return "adamw" if self.optimizer.adam_w_mode else "adam"  # type: ignore[attr-defined]
        return super().adam_update(settings)

    def hook_step(
        self,
        before: Callable[[], None],
        after: StepCallback,
        ended: Callable[[], None] = do_nothing,
    ) -> Undo:
        """Wraps ``_take_model_step``, and the optimizer's step inside it.

        `after` runs before DeepSpeed's scheduler changes the learning rate.
        """

        def model_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before()
            result = original(*args, **kwargs)
            ended()
            return result

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            after(not getattr(self._zero, "overflow", False))
            return result

        undos = [
            patch_method(self._engine, "_take_model_step", model_step),
            patch_method(self._zero, "step", step),
        ]
        return lambda: undo_all(undos)


def refuse_untrained(names: Sequence[str]) -> None:
    """Refuses parameters that became trainable too late for DeepSpeed.

    Raises:
        InputError: there is a name.
    """
    if names:
        raise InputError(
            f"monitor: parameter {names[0]} became trainable after deepspeed.initialize, which "
            "divides the trainable parameters among the ranks once: DeepSpeed does not train it; "
            "expected every parameter that is ever trained to be trainable then"
        )


def _offload_suffix(engine: Any) -> str:
    zero = engine._config.zero_config
    configs = [zero.offload_optimizer, zero.offload_param]
    is_offloaded = any(c is not None and str(c.device).endswith("cpu") for c in configs)
    return "-offload" if is_offloaded else ""

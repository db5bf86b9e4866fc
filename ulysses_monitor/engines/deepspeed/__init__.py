"""DeepSpeed ZeRO-0 to ZeRO-3: the only folder that uses DeepSpeed's private attributes.

The gradients are read when the engine enters ``_take_model_step``, which runs only at accumulation
boundaries. At that moment they are reduced, not yet clipped, and still multiplied by the loss
scale. A `TrainerCallback` runs later, when DeepSpeed has already freed them.
"""

from __future__ import annotations

from typing import Any

from ulysses_monitor.engines.base import Engine
from ulysses_monitor.engines.deepspeed.supported import refuse_unsupported
from ulysses_monitor.engines.deepspeed.zero0 import MasterWeightsEngine, Zero0Engine
from ulysses_monitor.engines.deepspeed.zero3 import Zero3Engine
from ulysses_monitor.engines.deepspeed.zero12 import Zero12Engine

__all__ = ["find_deepspeed_engine"]


def find_deepspeed_engine(model: Any) -> Engine | None:
    """Finds the view of a `deepspeed.DeepSpeedEngine`; None if `model` is anything else.

    Raises:
        InputError: the DeepSpeed version or a feature in use is not supported.
    """
    if not _is_deepspeed_engine(model):
        return None
    refuse_unsupported(model)
    stage = model.zero_optimization_stage()
    if stage == 3:
        return Zero3Engine(model)
    if stage:
        return Zero12Engine(model)
    keeps_masters = hasattr(model.optimizer, "fp16_groups")
    return MasterWeightsEngine(model) if keeps_masters else Zero0Engine(model)


def _is_deepspeed_engine(model: object) -> bool:
    """Looks at names only, because DeepSpeed may not be installed."""
    return any(
        c.__module__.startswith("deepspeed.") and c.__name__ == "DeepSpeedEngine"
        for c in type(model).__mro__
    )

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

__all__ = ["is_deepspeed_engine", "make_deepspeed_view"]


def is_deepspeed_engine(model: object) -> bool:
    """Whether `model` is a `deepspeed.DeepSpeedEngine`; does not import DeepSpeed."""
    return any(
        c.__module__.startswith("deepspeed.") and c.__name__ == "DeepSpeedEngine"
        for c in type(model).__mro__
    )


def make_deepspeed_view(engine: Any) -> Engine:
    """Returns the view of a `deepspeed.DeepSpeedEngine`.

    Raises:
        InputError: the DeepSpeed version or a feature in use is not supported.
    """
    refuse_unsupported(engine)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return Zero3Engine(engine)
    if stage:
        return Zero12Engine(engine)
    keeps_masters = hasattr(engine.optimizer, "fp16_groups")
    return MasterWeightsEngine(engine) if keeps_masters else Zero0Engine(engine)

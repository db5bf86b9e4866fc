"""Which DeepSpeed versions and features the views support; anything else is refused."""

from __future__ import annotations

import logging
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines.support import check_spans_world

__all__ = ["refuse_unsupported"]

logger = logging.getLogger(__name__)

_VERSIONS = ("0.19.",)
"""Releases whose private attributes the views were written against and tested with."""

_OPTIMIZERS = {
    "DeepSpeedZeroOptimizer": (1, 2),
    "BF16_Optimizer": (1,),
    "DeepSpeedZeroOptimizer_Stage3": (3,),
    "FP16_Optimizer": (0,),
    "FP16_UnfusedOptimizer": (0,),
}
"""DeepSpeed's optimizer wrappers, each with the ZeRO stages it is supported in."""


def refuse_unsupported(engine: Any) -> None:
    """Refuses a DeepSpeed engine that no view reads correctly.

    Raises:
        InputError: names what was found and what is allowed.
    """
    import deepspeed

    stage = engine.zero_optimization_stage()
    if not deepspeed.__version__.startswith(_VERSIONS):
        raise InputError(
            f"monitor: the DeepSpeed version is {deepspeed.__version__}; "
            f"allowed: {', '.join(v + '*' for v in _VERSIONS)}"
        )
    if found := next((what for what, is_on in _refused(engine) if is_on), None):
        raise InputError(
            f"monitor: DeepSpeed runs with {found}, which is not supported; allowed: ZeRO-0 to "
            "ZeRO-3 over all ranks, with or without offload to the CPU"
        )
    check_spans_world(engine.seq_data_parallel_group, "DeepSpeed's data parallelism")
    wrapper = type(engine.optimizer)
    if wrapper.__module__.startswith("deepspeed.runtime.") and (
        stage not in _OPTIMIZERS.get(wrapper.__name__, ())
    ):
        raise InputError(
            f"monitor: DeepSpeed's optimizer in ZeRO-{stage} is {wrapper.__name__}; "
            f"allowed: {', '.join(name for name in _OPTIMIZERS if stage in _OPTIMIZERS[name])}"
        )
    if stage == 0 and engine.fp16_enabled():
        # Seen in 0.19.8: engine.backward() scales the loss only for ZeRO's own optimizers.
        logger.warning(
            "monitor: under ZeRO-0 with fp16, DeepSpeed %s divides the gradients by a loss scale "
            "that it never applied, so they are too small; use ZeRO-1. The metrics show the "
            "gradients that the optimizer gets.",
            deepspeed.__version__,
        )


def _refused(engine: Any) -> list[tuple[str, bool]]:
    zero = engine._config.zero_config
    swapped = [c for c in (zero.offload_optimizer, zero.offload_param) if c is not None]
    return [
        ("pipeline parallelism", bool(engine.pipeline_parallelism)),
        ("mixture-of-experts layers", bool(engine.has_moe_layers)),
        ("tensor parallelism", engine.autotp_size() > 1),
        ("an mpu of several model-parallel ranks", _model_parallel_size(engine) > 1),
        ("offload to NVMe", any(str(c.device).endswith("nvme") for c in swapped)),
        ("zero_hpz_partition_size", zero.zero_hpz_partition_size > 1),
        ("ZenFlow", zero.zenflow is not None),
        ("SuperOffload", bool(engine.super_offload())),
        ("no optimizer", engine.basic_optimizer is None),
    ]


def _model_parallel_size(engine: Any) -> int:
    size = getattr(engine.mpu, "get_model_parallel_world_size", None)
    return int(size()) if size is not None else 1

"""Trains a case under its engine with the monitor attached, on every rank of a gloo world."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.exact_cases import MODELS, ROWS, STEPS, Case, batches, optimizer_for
from tests.support.exact_reference import reference, worst_errors
from ulysses_monitor.engines import find_engine

__all__ = ["merged", "run_cases", "train", "whole_weights", "wrap"]


def run_cases(cases: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """Runs every case in turn in a child process, and compares on rank 0."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if any(case["engine"].startswith("zero") for case in cases):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results: dict[str, Any] = {}
    for number, settings in enumerate(cases):
        case = Case(**settings)
        try:
            records, weights, found = train(case, f"{folder}/{number}", rank, world)
            if rank == 0:
                found["worst"] = worst_errors(records, list(reference(case, weights, world)))
        except Exception:  # noqa: BLE001 - only the test of this case fails
            found = {"error": traceback.format_exc()}
        results[case.label] = found
    return results


def train(
    case: Case, run_dir: str, rank: int, world: int
) -> tuple[list[dict[str, float]], list[dict[str, Tensor]], dict[str, Any]]:
    """Returns the records, the weights before each step and at the end, and the engine's shards."""
    torch.manual_seed(0)
    model, sink = MODELS[case.model](), um.MemorySink()
    monitor = um.Monitor(
        run_dir, tensorboard=False, sinks=[sink], sample_every=1, if_exists="overwrite"
    )
    wrapped, optimizer, scaler = wrap(model, case)
    engine = find_engine(wrapped, optimizer, scaler=scaler)
    held = [[s.index, s.offset, s.param.numel()] for s in engine.shards()]
    found = {"held": held, "name": engine.name}
    weights = []
    with monitor.watch(wrapped, optimizer, scaler=scaler):
        for step in range(STEPS):
            weights.append(whole_weights(model))
            mine = batches(step, world, case.accumulate)[rank]
            if case.engine.startswith("zero"):
                for ids in mine:
                    wrapped.backward(wrapped(ids))
                    wrapped.step()
            else:
                plain_step(wrapped, optimizer, scaler, mine, case, monitor)
        weights.append(whole_weights(model))
    return merged(sink), weights, found


def merged(sink: um.MemorySink) -> list[dict[str, float]]:
    """Returns one dictionary per step; a follow-up's metrics arrive in a record of their own."""
    steps: dict[int, dict[str, float]] = {}
    for record in sink.records:
        steps.setdefault(record.step, {}).update(record.to_dict())
    return [steps[step] for step in sorted(steps)]


def wrap(
    model: nn.Module, case: Case, make: Callable[..., torch.optim.Optimizer] | None = None
) -> tuple[Any, Any, Any]:
    """Returns model, optimizer and scaler as the engine needs them."""
    make = make or partial(optimizer_for, kind=case.optimizer)
    if case.engine.startswith("zero"):
        return deepspeed_engine(model, case, make), None, None
    if case.bits == "bf16" and case.engine == "plain":
        model.bfloat16()
    if case.engine.startswith(("fsdp", "hsdp")):
        fully_sharded(model, case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if case.bits == "amp" else None
    optimizer = make(model)
    if case.engine == "ddp":
        return (
            nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
            optimizer,
            scaler,
        )
    return model, optimizer, scaler


def fully_sharded(model: nn.Module, case: Case) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    world = dist.get_world_size()
    names = ("replicate", "shard") if case.engine == "hsdp" else ("shard",)
    sizes = (2, world // 2) if case.engine == "hsdp" else (world,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh}
    if case.engine.endswith("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer, **options)
    fully_shard(model, **options)


def plain_step(
    model: Any,
    optimizer: Any,
    scaler: Any,
    mine: Tensor,
    case: Case,
    monitor: um.Monitor,
    half: bool = True,
) -> None:
    for ids in mine:
        with torch.autocast("cpu", torch.float16, enabled=half and scaler is not None):
            loss = model(ids) / len(mine)
        (loss if scaler is None else scaler.scale(loss)).backward()
    monitor.before_clip()
    if scaler is not None:
        scaler.unscale_(optimizer)
    if case.clip:
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def deepspeed_engine(
    model: nn.Module, case: Case, make: Callable[..., torch.optim.Optimizer]
) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": int(case.engine[4])}
    if "offload" in case.engine:
        zero["offload_optimizer"] = {"device": "cpu"}
    if case.engine.endswith("offload-all"):
        zero["offload_param"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.bits == "bf16":
        config["bf16"] = {"enabled": True}
    if case.bits == "bf16acc32":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.bits == "fp16":
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed refuses fp16 on a CPU because it is slow; torch supports it.
        get_accelerator().is_fp16_supported = lambda: True
        # DeepSpeed does not scale the loss under ZeRO-0, but its step divides by the scale.
        scale = 1024.0 if zero["stage"] else 1.0
        config["fp16"] = {"enabled": True, "loss_scale": scale}
    optimizer = make(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the weights in the optimizer's precision, gathered if sharded."""
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        state[name] = _full(tensor)
    return state


def _full(tensor: Any) -> Tensor:
    if hasattr(tensor, "full_tensor"):
        return tensor.detach().full_tensor().clone()
    if hasattr(tensor, "ds_tensor") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        if tensor.requires_grad:
            return safe_get_full_fp32_param(tensor).detach().clone().view(_shape(tensor))
    if hasattr(tensor, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().clone()


def _shape(tensor: Any) -> Any:
    return getattr(tensor, "ds_shape", tensor.shape)

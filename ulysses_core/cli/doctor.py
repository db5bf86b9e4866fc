"""`ulysses doctor`: what this machine has, and what a config needs of it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

from ulysses_core.cli.doubts import doubts
from ulysses_core.cli.launch import choose_processes
from ulysses_core.cli.tables import two_columns
from ulysses_core.cli.train import check
from ulysses_core.config import RunConfig, load_config
from ulysses_monitor.common.environment import package_versions

if TYPE_CHECKING:
    from ulysses_core.memory.estimate import Footprint

__all__ = ["doctor"]

_GIB = 1 << 30


def doctor(path: Path | None, overrides: list[str], nproc: int | None) -> None:
    """Prints the machine, and for a config the plan, the shares of heads and the memory.

    Raises:
        InputError: the config is wrong, as `ulysses train` would say.
    """
    console = Console()
    console.print(_machine())
    if path is None:
        return
    config = load_config(path, overrides)
    processes = choose_processes(nproc, config.settings.sequence_parallel_size)
    rows = check(config, processes)
    console.print(_needs(config, processes, rows))


def _machine() -> Table:
    import torch

    table = two_columns("this machine")
    table.add_row("python", platform.python_version())
    for package, version in package_versions().items():
        table.add_row(package, version)
    table.add_row("cores", str(psutil.cpu_count(logical=False) or psutil.cpu_count()))
    table.add_row("memory", _bytes(psutil.virtual_memory().total))
    table.add_row("accelerators", _accelerators())
    table.add_row("C++ compiler", shutil.which("c++") or "none: DeepSpeed cannot build its ops")
    table.add_row("flash-attn", _installed("flash_attn", "none: torch's SDPA is used"))
    distributed = [b for b in ("gloo", "nccl", "mpi") if torch.distributed.is_backend_available(b)]
    table.add_row("backends", ", ".join(distributed))
    return table


def _accelerators() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: training runs on the CPU, over gloo"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} {_bytes(p.total_memory)}" for p in names)


def _installed(module: str, otherwise: str) -> str:
    return "installed" if importlib.util.find_spec(module) else otherwise


def _needs(config: RunConfig, processes: int, rows: dict[str, int]) -> Table:
    size = config.settings.sequence_parallel_size
    model = _meta_model(config)
    need = _footprint(config, model, processes)
    table = two_columns(f"what {config.name} needs")
    table.add_row("processes", f"{processes} = data {processes // size} x sequence {size}")
    table.add_row("rows", ", ".join(f"{name} {count}" for name, count in rows.items()))
    table.add_row("parameters", f"{need.parameters:,}, of them trained {need.trained_parameters:,}")
    table.add_row("row on each rank", f"{-(-config.data.cutoff_len // size)} tokens")
    for label, text in _heads(model.config, size, need):
        table.add_row(label, text)
    room = _memory_per_process(processes)
    table.add_row("weights and states", f"{_bytes(need.state_bytes())} a process")
    table.add_row("activations", f"about {_bytes(need.activation_bytes())} a process")
    table.add_row("logits", f"about {_bytes(need.logit_bytes())} a process")
    table.add_row("memory that is there", _bytes(room))
    for policy, doubt in doubts(config, need.trained_parameters):
        table.add_row(f"policy {policy}", doubt)
    if need.peak_bytes() > room:
        from ulysses_core.memory.estimate import suggest_settings

        advice = suggest_settings(need, room, on_gpu=_on_gpu())
        table.add_row("advice", "it does not fit; switch on, in this order: " + ", ".join(advice))
    return table


def _footprint(config: RunConfig, model: Any, processes: int) -> Footprint:
    from ulysses_core.memory.estimate import Footprint

    settings, training = config.settings, config.training
    rows = training.get("per_device_train_batch_size", 8)
    return Footprint.from_model(
        model,
        processes=processes,
        zero_stage=(config.deepspeed or {}).get("zero_optimization", {}).get("stage", 0),
        has_master_weights=config.deepspeed is not None,
        element_size=2 if training.get("bf16") or training.get("fp16") else 4,
        tokens=rows * -(-config.data.cutoff_len // settings.sequence_parallel_size),
        checkpointing=bool(training.get("gradient_checkpointing")),
        offload_checkpoints=settings.offload_checkpoints and _on_gpu(),
        loss_chunk=settings.loss_chunk,
        mlp_chunk=settings.mlp_chunk,
    )


def _meta_model(config: RunConfig) -> Any:
    """The model with no memory behind its weights, with its adapters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ulysses_core.trainers.build import add_adapters, build_architecture, build_tokenizer

    if config.model.architecture is not None:
        made = build_architecture(config.model.architecture, build_tokenizer(config.model))
    else:
        made = AutoConfig.from_pretrained(config.model.model_name_or_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
        return add_adapters(model, config.finetuning)


def _heads(config: Any, size: int, need: Footprint) -> list[tuple[str, str]]:
    """How heads fall on the ranks, and what a micro-batch makes them send."""
    from ulysses_core.parallel.exchange import plan_heads

    heads = config.num_attention_heads
    plan = plan_heads(heads, getattr(config, "num_key_value_heads", None) or heads, size)
    query = ", ".join(str(b - a) for a, b in plan.query)
    key = ", ".join(str(b - a) for a, b in plan.key)
    rows = [("query heads by rank", query), ("key/value heads by rank", key)]
    if size > 1:
        vectors = max(plan.count_sent(rank, need.tokens) for rank in range(size))
        # Forward and backward pass; with checkpointing the forward pass is made twice.
        passes = 3 if need.checkpointing else 2
        sent = vectors * (need.query_size // heads) * need.element_size * need.layers * passes
        rows.append(("exchange", f"{_bytes(sent)} sent by a rank for each micro-batch"))
    return rows


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _memory_per_process(processes: int) -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total // processes)


def _bytes(count: int) -> str:
    if count < _GIB:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{count / _GIB:.1f} GiB"

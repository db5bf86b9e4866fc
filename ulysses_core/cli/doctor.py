"""`ulysses doctor`: shows what this machine has and what a config needs."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

from ulysses_core.cli.checks import build_meta_model, check
from ulysses_core.cli.launch import choose_processes
from ulysses_core.cli.policy_warnings import find_policy_warnings
from ulysses_core.cli.tables import as_text, describe_processes, make_table
from ulysses_core.config import RunConfig
from ulysses_core.trainers.stage import load_config
from ulysses_monitor.common.environment import package_versions
from ulysses_monitor.common.extras import find_missing

if TYPE_CHECKING:
    from ulysses_core.memory.estimate import Footprint

__all__ = ["doctor"]

_GIB = 1 << 30


def doctor(path: Path | None, overrides: list[str], nproc: int | None) -> None:
    """Prints a table of the machine, and for a config one of processes, heads and memory.

    Raises:
        InputError: the config is wrong; the message is that of `ulysses train`.
    """
    console = Console()
    console.print(_make_machine_table())
    if path is None:
        return
    config = load_config(path, overrides)
    processes = choose_processes(nproc, config.settings.sequence_parallel_size)
    check(config, processes)
    console.print(_make_needs_table(config, processes))


def _make_machine_table() -> Table:
    import torch

    table = make_table("this machine")
    table.add_row("Python", platform.python_version())
    for package, version in package_versions().items():
        table.add_row(package, version)
    if missing := find_missing("core"):
        table.add_row(
            "training core",
            as_text(
                f"not installed: {', '.join(missing)}; run pip install 'ulysses-toolkit[core]'"
            ),
        )
    table.add_row("CPU cores", str(psutil.cpu_count(logical=False) or psutil.cpu_count()))
    table.add_row("memory", _format_bytes(psutil.virtual_memory().total))
    table.add_row("GPUs", _describe_gpus())
    table.add_row("C++ compiler", shutil.which("c++") or "none: DeepSpeed cannot build its ops")
    has_flash = importlib.util.find_spec("flash_attn") is not None
    table.add_row(
        "flash-attn", "installed" if has_flash else "not installed: attention uses torch's SDPA"
    )
    distributed = [b for b in ("gloo", "nccl", "mpi") if torch.distributed.is_backend_available(b)]
    table.add_row("communication", ", ".join(distributed))
    return table


def _describe_gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: training runs on the CPU with gloo"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} {_format_bytes(gpu.total_memory)}" for gpu in gpus)


def _make_needs_table(config: RunConfig, processes: int) -> Table:
    size = config.settings.sequence_parallel_size
    model = build_meta_model(config)
    need = _estimate_footprint(config, model, processes)
    table = make_table(f"what {config.name} needs")
    table.add_row("processes", describe_processes(processes, size))
    table.add_row("datasets", as_text(", ".join(config.data.dataset)))
    table.add_row("parameters", f"{need.parameters:,}, {need.trained_parameters:,} of them trained")
    table.add_row("longest slice", f"{-(-config.data.cutoff_len // size):,} tokens per rank")
    for label, text in _describe_heads(model.config, size, need):
        table.add_row(label, text)
    available = _memory_per_process(processes)
    table.add_row("weights and states", f"{_format_bytes(need.state_bytes())} per process")
    table.add_row("activations", f"about {_format_bytes(need.activation_bytes())} per process")
    table.add_row("logits", f"about {_format_bytes(need.logit_bytes())} per process")
    table.add_row("available memory", f"{_format_bytes(available)} per process")
    for policy, warning in find_policy_warnings(config, need.trained_parameters):
        table.add_row(as_text(f"policy {policy}"), warning)
    if need.peak_bytes() > available:
        from ulysses_core.memory.estimate import suggest_settings

        advice = suggest_settings(need, available, on_gpu=_on_gpu())
        table.add_row("advice", "does not fit in memory; add in this order: " + ", ".join(advice))
    return table


def _estimate_footprint(config: RunConfig, model: Any, processes: int) -> Footprint:
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


def _describe_heads(config: Any, size: int, need: Footprint) -> list[tuple[str, str]]:
    """Returns rows about the heads of each rank and the bytes that the exchange sends."""
    from ulysses_core.parallel.exchange import plan_heads

    heads = config.num_attention_heads
    plan = plan_heads(heads, getattr(config, "num_key_value_heads", None) or heads, size)
    query = ", ".join(str(b - a) for a, b in plan.query)
    key = ", ".join(str(b - a) for a, b in plan.key)
    rows = [("query heads by rank", query), ("key/value heads by rank", key)]
    if size > 1:
        vectors = max(plan.count_sent(rank, need.tokens) for rank in range(size))
        # A forward and a backward pass; checkpointing runs the forward pass twice.
        passes = 3 if need.checkpointing else 2
        sent = vectors * (need.query_size // heads) * need.element_size * need.layers * passes
        rows.append(("exchange", f"a rank sends {_format_bytes(sent)} per micro-batch"))
    return rows


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _memory_per_process(processes: int) -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total // processes)


def _format_bytes(count: int) -> str:
    if count < _GIB:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{count / _GIB:.1f} GiB"

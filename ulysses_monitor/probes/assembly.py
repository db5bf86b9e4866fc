"""Chooses the probes of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import nn

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo
from ulysses_monitor.common.ranks import any_rank, world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.engines.support import strip_wrappers
from ulysses_monitor.probes.adapters import AdapterProbe
from ulysses_monitor.probes.base import Probe
from ulysses_monitor.probes.capture import Capture
from ulysses_monitor.probes.consistency import ReplicaProbe
from ulysses_monitor.probes.layout import Layout
from ulysses_monitor.probes.memory import MemoryProbe
from ulysses_monitor.probes.standard import AdamStateProbe, GradientProbe, ParameterProbe
from ulysses_monitor.probes.updates import UpdateProbe

__all__ = ["assemble", "find_expert_adapters"]

logger = logging.getLogger(__name__)


def assemble(
    engine: Engine,
    sample_every: int,
    next_is_sampled: Callable[[], bool],
    guard: Guard,
    on_request: Sequence[Probe] = (),
) -> tuple[Capture, list[Undo]]:
    """Builds the capture with every probe that fits `engine`; every rank must call it.

    Args:
        engine: the engine to read.
        sample_every: see `Capture`.
        next_is_sampled: tells whether the coming step is one at which ``sampled`` probes are read.
        guard: switches off probes that keep failing.
        on_request: further probes, which the user asked for.

    Returns:
        The capture, and functions that remove its hooks.
    """
    names, numels = zip(*engine.parameters(), strict=True)
    every = tuple(strip_wrappers(name) for name, _ in engine.model.named_parameters())
    layout = Layout(names, numels, every, find_expert_adapters(engine.model))
    probes: list[Probe] = [GradientProbe(layout), AdamStateProbe(layout), ParameterProbe(layout)]
    undos: list[Undo] = []
    if layout.adapter_pairs:
        adapters = _make_adapter_probe(layout, engine, next_is_sampled)
        if adapters is not None:
            probes.append(adapters)
            undos.append(adapters.close)
    if engine.replica_sets and world_size() > engine.replica_sets:
        probes.append(ReplicaProbe(layout, engine))
    probes += [MemoryProbe(engine.device), *on_request]
    follow_ups = [UpdateProbe(layout, engine)]
    return Capture(engine, probes, sample_every, follow_ups, guard), undos


def find_expert_adapters(model: nn.Module) -> frozenset[str]:
    """Returns the names of modules in which PEFT adapts a stack of experts (`target_parameters`).

    Their A is [E * r, I] and their B is [O, r * E] for E experts.
    """
    return frozenset(
        strip_wrappers(name)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and getattr(module, "num_experts", 1) > 1
    )


def _make_adapter_probe(
    layout: Layout, engine: Engine, next_is_sampled: Callable[[], bool]
) -> AdapterProbe | None:
    """Makes the adapter probe, or None on all ranks if PEFT's internals have changed on any."""
    probe = None
    try:
        probe = AdapterProbe(layout, engine, next_is_sampled)
    except Exception:
        logger.exception(
            "monitor: the LoRA adapters could not be read; lora/delta_ratio and lora/stable_rank "
            "are off"
        )
    if any_rank(probe is None, engine.device):
        if probe is not None:
            probe.close()
        return None
    return probe

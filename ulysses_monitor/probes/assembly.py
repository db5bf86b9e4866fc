"""Which probes a run has."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ulysses_monitor.common.patching import Undo
from ulysses_monitor.common.ranks import any_rank, world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.adapters import AdapterProbe
from ulysses_monitor.probes.base import Probe
from ulysses_monitor.probes.capture import Capture
from ulysses_monitor.probes.consistency import ReplicaProbe
from ulysses_monitor.probes.layout import Layout
from ulysses_monitor.probes.standard import AdamStateProbe, GradientProbe, ParameterProbe
from ulysses_monitor.probes.updates import UpdateProbe

__all__ = ["assemble"]

logger = logging.getLogger(__name__)


def assemble(
    engine: Engine, sample_every: int, next_is_sampled: Callable[[], bool]
) -> tuple[Capture, list[Undo]]:
    """The capture of every metric that `engine`'s parameters have; every rank must call it.

    Args:
        engine: what to read.
        sample_every: see `Capture`.
        next_is_sampled: whether the coming step is one at which ``sampled`` probes are read.

    Returns:
        The capture, and what takes its hooks back.
    """
    layout = Layout(*map(tuple, zip(*engine.parameters(), strict=True)))
    probes: list[Probe] = [GradientProbe(layout), AdamStateProbe(layout), ParameterProbe(layout)]
    undos: list[Undo] = []
    if layout.adapter_pairs:
        adapters = _adapters(layout, engine, next_is_sampled)
        if adapters is not None:
            probes.append(adapters)
            undos.append(adapters.close)
    if engine.replica_sets and world_size() > engine.replica_sets:
        probes.append(ReplicaProbe(layout, engine))
    return Capture(engine, probes, sample_every, [UpdateProbe(layout, engine.optimizer)]), undos


def _adapters(
    layout: Layout, engine: Engine, next_is_sampled: Callable[[], bool]
) -> AdapterProbe | None:
    """It knows how PEFT is made inside; where that has changed there is none, on no rank."""
    probe = None
    try:
        probe = AdapterProbe(layout, engine, next_is_sampled)
    except Exception:
        logger.exception("monitor: the adapters could not be looked into; no lora/delta_ratio")
    if any_rank(probe is None, engine.device):
        if probe is not None:
            probe.close()
        return None
    return probe

"""Trains a step under each engine with the module probe, on every rank of a gloo world."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import ulysses_monitor as um
from tests.support.exact_cases import Case, batches, llama
from tests.support.exact_engines import merged, wrap

__all__ = ["WORLD", "run_engines", "take_step"]

WORLD = 2


def run_engines(engines: list[str], folder: str) -> dict[str, dict[str, float]]:
    """Returns the metrics of a step under each engine."""
    if any(engine.startswith("zero") for engine in engines):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    return {e: take_step(e, f"{folder}/{e}", batches(0, WORLD, 1)[rank]) for e in engines}


def take_step(engine: str, run_dir: str, mine: Any) -> dict[str, float]:
    """Takes a step of micro-batches; returns its metrics on the rank that records."""
    torch.manual_seed(0)
    model, sink = llama(), um.MemorySink()
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    monitor = um.Monitor(
        run_dir, tensorboard=False, sinks=[sink], if_exists="overwrite", probes=["modules"]
    )
    wrapped, optimizer, _ = wrap(model, Case(engine=engine))
    with monitor.watch(wrapped, optimizer):
        for ids in mine:
            loss = wrapped(ids, labels=ids).loss
            wrapped.backward(loss) if engine.startswith("zero") else loss.backward()
        wrapped.step() if engine.startswith("zero") else optimizer.step()
    ours = [h for m in model.modules() for h in m._forward_hooks.values() if _is_ours(h)]
    found = merged(sink)[0] if sink.records else {}
    return {**found, "hooks left": float(len(ours)), "hooks before": float(hooks)}


def _is_ours(hook: Any) -> bool:
    return "ulysses_monitor" in str(getattr(hook, "__module__", ""))

"""Writes runs with everything that a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ulysses_monitor.reading import RunReader, open_run
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

NAN, INF = float("nan"), float("inf")
INFO = {
    "engine": "plain",
    "world_size": 2,
    "config": {"learning_rate": 2e-4, "lora_rank": 8},
    "model": {"class": "TinyLM", "parameters": 1_240_000_000, "trainable_parameters": 5_640_000},
    "versions": {"torch": "2.13.0"},
    "host": "node-1",
    "max_steps": 12,
}


def make_run(
    path: Path,
    steps: Iterable[Mapping[str, float]],
    *,
    events: Iterable[Event] = (),
    info: Mapping[str, Any] = INFO,
    status: str = "finished",
) -> RunReader:
    """Writes a run whose step n, counted from 1, holds the n-th of `steps`."""
    directory = RunDirectory(path)
    directory.start(info)
    sink = StoreSink(directory)
    schemas: dict[tuple[str, ...], Schema] = {}
    for step, metrics in enumerate(steps, start=1):
        schema = schemas.setdefault(tuple(metrics), Schema(tuple(metrics)))
        sink.write(StepRecord(step, 1e9 + step, schema, np.array([*metrics.values()], np.float64)))
    for event in events:
        sink.write(event)
    sink.close()
    directory.finish(status)
    return open_run(path)


def step_metrics(step: int, *, layers: int = 3, extra: int = 0) -> dict[str, float]:
    """Returns a realistic step with LoRA on every layer; optimizer metrics come every 5 steps."""
    sides = [f"m.layers.{i}.q.lora_{s}.default.weight" for i in range(layers) for s in "AB"]
    params = [*sides, *(f"m.extra.{i}.weight" for i in range(extra))]
    scopes = ["total", *(f"layer/{i}" for i in range(layers)), *(f"param/{p}" for p in params)]
    norm = 3.0 / step + 0.1
    metrics = {f"grad/norm/{scope}": norm * (1 + i % 7) for i, scope in enumerate(scopes)}
    ratio = INF if step == 1 else 1 + 40 / step
    metrics |= {
        f"lora/grad_ratio_B_A/module/m.layers.{i}.q": ratio * (1 + i) for i in range(layers)
    }
    if step % 5 == 1 and step > 1:
        metrics |= {f"optim/exp_avg_norm/{scope}": norm / 3 for scope in scopes}
        metrics |= {f"optim/exp_avg_sq_mean/{scope}": norm**2 / 1e6 for scope in scopes}
    return metrics | {
        "lora/grad_ratio_B_A/total": ratio,
        "optim/lr/0": 1e-4,
        "train/loss/total": 1 + 1 / step,
        "grad/clip_coef/total": min(1.0, 1 / norm),
        "train/step_seconds/total": 0.5,
        "train/tokens_per_second/total": 12_345.0,
        "monitor/overhead_seconds/total": 0.004,
    }

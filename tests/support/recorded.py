"""Writes runs for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ulysses_monitor as um
from ulysses_monitor.records import StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink


def write_run(path: Path, items: list[Any], status: str | None = "finished") -> um.RunReader:
    """Writes a run with `items`; without a status, the run looks like a crashed one."""
    directory = RunDirectory(path)
    directory.start({"engine": "ddp", "world_size": 2})
    sink = StoreSink(directory)
    for item in items:
        sink.write(item)
    sink.close()
    directory.release() if status is None else directory.finish(status)
    return um.open_run(path)


def training(steps: int) -> list[StepRecord]:
    """Returns records with eight metrics for steps 1 to `steps`, a second apart."""
    return [
        StepRecord.of(
            step,
            float(step),
            {
                "train/loss/total": 10.0 - step,
                "train/step_seconds/total": 2.0,
                "train/tokens_per_second/total": 100.0,
                "grad/norm/total": 1.0,
                "grad/norm/layer/0": 0.5,
                "grad/norm/layer/10": 0.25,
                "lora/grad_ratio_B_A/total": np.inf if step == 1 else 10.0 / step,
                "monitor/overhead_seconds/total": 0.02,
            },
        )
        for step in range(1, steps + 1)
    ]


def curve(name: str, values: Any, *, start: float = 0.0) -> list[StepRecord]:
    """Returns records of one metric, from step 1, a second apart."""
    return [
        StepRecord.of(step, start + step, {name: float(value)})
        for step, value in enumerate(values, 1)
    ]

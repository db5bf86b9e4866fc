"""What the module probe costs: `python -m benchmarks.modules`, CPU milliseconds of a step.

A Llama of a config trains on a CPU without the monitor, with it, and with the probe at every step
and at every tenth. The ways take turns, step by step, so that another program on the machine slows
all of them alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ulysses_monitor as um
from benchmarks.models import SIZES, Size, build_llama
from benchmarks.tables import table

WAYS: dict[str, dict[str, Any] | None] = {
    "without the monitor": None,
    "the monitor": {"probes": [], "sample_every": 10},
    "module probe at every 10th step": {"probes": ["modules"], "sample_every": 10},
    "module probe at every step": {"probes": ["modules"], "sample_every": 1},
    "the monitor, sampling at every step": {"probes": [], "sample_every": 1},
    "module probe at every step, without attention": {
        "probes": [{"modules": {"attention": False}}],
        "sample_every": 1,
    },
}


def _steps(settings: dict[str, Any] | None, stack: ExitStack, size: Size) -> Iterator[float]:
    """Trains for ever; yields the milliseconds of each step."""
    torch.manual_seed(0)
    model = build_llama(size, head_size=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if settings is not None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        monitor = um.Monitor(folder / "run", tensorboard=False, rules="off", **settings)
        stack.enter_context(monitor.watch(model, optimizer))
    while True:
        ids = torch.randint(size.vocabulary, (size.rows, size.tokens))
        began = time.thread_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield 1e3 * (time.thread_time() - began)


def measure(size: Size, steps: int) -> dict[str, np.ndarray]:
    """Returns the milliseconds of each way's steps, after ten that are not counted."""
    with ExitStack() as stack:
        runs = {title: _steps(settings, stack, size) for title, settings in WAYS.items()}
        rows = [[next(run) for run in runs.values()] for _ in range(steps + 10)]
    return dict(zip(runs, np.array(rows[10:]).T, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = SIZES[args.size]
    found = measure(size, args.steps)
    usual = found["without the monitor"]
    rows = []
    for title, taken in found.items():
        more = np.mean(taken) / np.mean(usual) - 1
        rows.append([title, f"{np.mean(taken):.1f}", f"{np.median(taken):.1f}", f"{more:+.1%}"])
    text = (
        f"# What the module probe costs\n\nLlama {args.size}, width {size.hidden}, {size.layers} "
        f"layers, {size.rows} rows of {size.tokens} tokens, AdamW, sdpa, {torch.get_num_threads()} "
        f"thread of a CPU, {args.steps} steps of each in turn; CPU time of that thread.\n\n"
        + table(["training", "mean, ms a step", "median", "mean against the first"], rows)
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

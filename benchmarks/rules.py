"""What rules cost a step: `python -m benchmarks.rules`, milliseconds for 5,000 metrics.

A made-up training of 5,000 metrics: gradients of each layer and tensor at every step, optimizer
state, updates and adapters at every tenth, and what a Trainer of RL logs at every fifth.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.tables import table
from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.rules import BOOK, RuleSet, make_rules

LAYERS = 32
EXPRESSIONS = (
    "grad/norm/total > 3 * median(50) for 5",
    "train/loss/total > 2 * ema(20) and grad/norm/total > 1",
    "train/tokens_per_second/total < 0.5 * mean(20) for 10",
    "optim/update_ratio/total > 0.1 or optim/update_ratio/total < 1e-8",
    "train/entropy/total < 0.1 for 3",
)

INPUTS = {
    "grad/carried/total": 0.0,
    "data/label_own/total": 1.0,
    "data/label_copied/total": 0.02,
    "data/label_ahead/total": 0.02,
    "data/label_padded/total": 0.0,
    "data/dominant_token/total": 0.05,
    "data/token_overlap/total": 0.9,
    "data/special_tokens/total": 0.03,
    "data/duplicate_rows/total": 0.01,
    "data/rows_at_longest/total": 0.05,
}
"""What goes into a step, and its healthy value."""

SETTINGS = {
    "optim/beta1/0": 0.9,
    "optim/beta2/0": 0.999,
    "optim/eps/0": 1e-8,
    "optim/weight_decay/0": 1e-2,
}
MODULES = ("activation/rms/total", "activation/kurtosis/total", "attention/logit_max/total")


def names(metrics: int) -> list[str]:
    """Returns the names of what is measured at every step."""
    kinds = ("norm", "abs_mean", "max", "zero_frac", "nonfinite")
    tensors = (metrics - 20) // len(kinds) - LAYERS - 1
    scopes = [
        "total",
        *(f"layer/{i}" for i in range(LAYERS)),
        *(f"param/model.layers.{i % LAYERS}.block.{i}.weight" for i in range(tensors)),
    ]
    every = [f"grad/{kind}/{scope}" for kind in kinds for scope in scopes]
    every += ["train/loss/total", "train/loss_tokens/total", "train/step_seconds/total"]
    every += ["train/tokens_per_second/total", "grad/clip_coef/total", "optim/lr/0", "optim/lr/1"]
    return [*every, "system/host_memory_bytes/total", "train/loss_rank_std/total", *INPUTS]


def sampled_names(every: Sequence[str]) -> list[str]:
    """Returns the names of what is measured at every tenth step."""
    scopes = [n.removeprefix("grad/norm/") for n in every if n.startswith("grad/norm/")]
    kinds = ("optim/update_ratio", "optim/exp_avg_norm", "optim/exp_avg_sq_mean", "param/norm")
    found = [f"{kind}/{scope}" for kind in kinds for scope in scopes]
    found += ["lora/delta_ratio/total", "lora/stable_rank/total", "lora/grad_ratio_B_A/total"]
    return [*found, *MODULES, *SETTINGS, "param/mismatch/total", "grad/mismatch/total"]


def logged_names() -> list[str]:
    """Returns the names of what a Trainer of RL logs."""
    needs = {need for entry in BOOK.values() for need in entry.make().needs}
    return sorted(n for n in needs if n.startswith("train/") and "*" not in n and "loss" not in n)


def steps(count: int, metrics: int, seed: int = 0) -> Iterator[list[StepRecord]]:
    """Yields the records of each step of a healthy training."""
    draw = np.random.default_rng(seed)
    every = names(metrics)
    schema, late = Schema(tuple(every)), Schema(tuple(sampled_names(every)))
    logged = Schema(tuple(set(logged_names()) - set(every)))
    usual = np.ones(len(every))
    weights = [i for i, name in enumerate(late.names) if name.startswith("param/norm")]
    for i, name in enumerate(every):
        usual[i] = 0.0 if "nonfinite" in name or "zero_frac" in name else 1.0
    for step in range(1, count + 1):
        found = usual * draw.lognormal(0, 0.1, len(usual))
        found[-len(INPUTS) :] = list(INPUTS.values())
        records = [_record(step, schema, found)]
        if step % 10 == 1:
            values = 1e-3 * draw.lognormal(0, 0.1, len(late.names))
            values[-2:] = 0.0  # replicas are equal
            values[-2 - len(SETTINGS) : -2] = list(SETTINGS.values())
            values[weights] = 1.0
            records.append(_record(step, late, values))
        if step % 5 == 0:
            records.append(_record(step, logged, draw.lognormal(0, 0.1, len(logged.names))))
        yield records


def _record(step: int, schema: Schema, values: np.ndarray) -> StepRecord:
    return StepRecord(step, float(step), schema, values)


def measure(rules: Sequence[object], count: int, metrics: int) -> tuple[np.ndarray, int]:
    """Returns milliseconds of each step after the first 300, and the number of alerts."""
    rule_set, taken, alerts = RuleSet(rules), [], 0  # type: ignore[arg-type]
    gc.collect()
    for records in steps(count, metrics):
        began = time.thread_time()
        for record in records:
            alerts += len(rule_set.observe(record))
        taken.append(1e3 * (time.thread_time() - began))
    return np.array(taken[300:]), alerts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    everything = list(BOOK)
    sets = {
        "no rules": [],
        "default": "default",
        "strict": "strict",
        f"all {len(everything)} rules": everything,
        f"all rules and {len(EXPRESSIONS)} expressions": [*everything, *EXPRESSIONS],
    }
    rows = []
    for title, specs in sets.items():
        rules = make_rules(specs)
        taken, alerts = measure(rules, args.steps, args.metrics)
        best = np.quantile(taken, [0.5, 0.9, 0.99])
        row = [title, len(rules), f"{taken.mean():.3f}", *(f"{q:.3f}" for q in best), alerts]
        rows.append([str(cell) for cell in row])
    head = ["rules", "number", "mean, ms", "median", "90 %", "99 %", "alerts"]
    text = (
        f"# What rules cost a step\n\n{args.metrics:,} metrics, {args.steps - 300:,} steps, "
        f"{platform.machine()}, Python {platform.python_version()}, CPU time of one thread. A step "
        "has the "
        "metrics of every step, every tenth those that are sampled too, every fifth what a Trainer "
        "of RL logs.\n\n" + table(head, rows)
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

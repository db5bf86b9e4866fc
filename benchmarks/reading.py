"""What `ulysses report` and `ulysses replay` need to read a long run: memory and time.

    python -m benchmarks.reading [--steps 30000] [--metrics 2000] [--tree PATH ...] [--rounds 1]

Writes runs with the store's own writer, in parts and compacted, and runs each command on each in a
process of its own. `--tree` names other checkouts to compare with. `replay, own rule` has a rule of
the user's, which sees every metric.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

__all__ = ["COMMANDS", "MEASURED", "OWN_RULE", "ROOT", "measure", "write_run"]

ROOT = Path(__file__).resolve().parents[1]
OWN_RULE = "def own(history):\n    return []\n"
MEASURED = """
import sys
from ulysses_core.cli import main
try:
    main()
finally:
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            print(line.split()[1])
"""
"""Prints the command's own peak: `resource.getrusage` also counts the process that started it."""
COMMANDS = {
    "report": ["report"],
    "replay": ["replay"],
    "replay, own rule": ["replay", "--rules", "own_rule:own"],
    "replay, policies": ["replay", "--policies", "adaptive"],
}
_TOTALS = (
    *("train/loss/total", "train/step_seconds/total", "train/tokens_per_second/total"),
    *("grad/norm/total", "grad/nonfinite/total", "grad/clip_coef/total", "optim/lr/0"),
    *("lora/grad_ratio_B_A/total", "monitor/overhead_seconds/total", "train/reward/total"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--metrics", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tree", type=Path, nargs="*", default=[], help="other checkouts")
    arguments = parser.parse_args()
    trees = {path.name: path.resolve() for path in arguments.tree} | {"this": ROOT}
    with tempfile.TemporaryDirectory(prefix="ulysses-reading-") as scratch:
        (folder := Path(scratch)).joinpath("own_rule.py").write_text(OWN_RULE)
        print("| run | command | checkout | peak, MB | seconds |")
        print("|---|---|---|---|---|")
        for layers in (32, 300):
            for form in ("parts", "compacted"):
                write_run(folder / "run", layers, arguments.steps, arguments.metrics, form)
                _compare(folder, f"{layers} layers, {form}", trees, arguments.rounds)


def write_run(path: Path, layers: int, steps: int, metrics: int, form: str) -> None:
    """Writes a run in which every step has all metrics, in place of what is at `path`."""
    names = name_metrics(layers, metrics)
    directory = RunDirectory(path, "overwrite")
    directory.start({"engine": "plain", "world_size": 1, "max_steps": steps})
    sink, schema, random = StoreSink(directory), Schema(names), np.random.default_rng(0)
    level = random.lognormal(0.0, 1.0, len(names))
    level[names.index("grad/nonfinite/total")] = 0.0
    for step in range(1, steps + 1):
        values = level * random.lognormal(0.0, 0.1, len(names))
        sink.write(StepRecord(step, 1e9 + step, schema, values))
    with patch("ulysses_monitor.store.sink.is_small", return_value=form == "compacted"):
        sink.close()
    directory.finish("finished")


def name_metrics(layers: int, count: int) -> tuple[str, ...]:
    """Returns `count` names: totals, three metrics of each layer, LoRA modules, parameters."""
    kinds = ("grad/norm", "optim/exp_avg_norm", "optim/exp_avg_sq_mean")
    names = [*_TOTALS, *(f"{kind}/layer/{i}" for kind in kinds for i in range(layers))]
    left = count - len(names)
    names += [f"lora/grad_ratio_B_A/module/m.layers.{i}.q" for i in range(left // 4)]
    names += [f"grad/norm/param/m.layers.{i}.weight" for i in range(count - len(names))]
    return tuple(names)


def _compare(folder: Path, run: str, trees: dict[str, Path], rounds: int) -> None:
    for name, command in COMMANDS.items():
        for tree, root in trees.items():
            for _ in range(rounds):
                peak, seconds = measure(root, folder, [*command, "run"])
                print(f"| {run} | {name} | {tree} | {peak:.0f} | {seconds:.1f} |", flush=True)


def measure(root: Path, folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Runs a command of the checkout `root`; returns its peak memory in MB, and its seconds."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"ulysses {' '.join(arguments)}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1]) / 1024, time.perf_counter() - begin


if __name__ == "__main__":
    main()

"""Prints the worst relative error of each metric under each engine, as docs/engines.md shows it.

    python -m benchmarks.exactness

It runs the cases of tests/monitor/engines.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.monitor.engines.test_engines_exactness import ONE, WORLDS, errors_of

COLUMNS = (
    ("grad/norm", "norm"),
    ("grad/abs_mean", "abs_mean"),
    ("grad/max", "max"),
    ("grad/zero_frac", "zero_frac"),
    ("grad/clip_coef", "clip_coef"),
    ("param/norm", "param/norm"),
    ("optim/exp_avg_norm", "exp_avg_norm"),
    ("optim/exp_avg_sq_mean", "exp_avg_sq_mean"),
    ("optim/update_ratio", "update_ratio"),
    ("lora/grad_ratio_B_A", "grad_ratio_B_A"),
    ("lora/update_ratio_A", "update_ratio_A"),
    ("lora/update_ratio_B", "update_ratio_B"),
    ("lora/delta_ratio", "delta_ratio"),
    ("lora/stable_rank", "stable_rank"),
)


def main() -> None:
    """Runs every case of the tests and prints one row for each engine and precision."""
    rows: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    ranks: dict[tuple[str, str], set[int]] = defaultdict(set)
    for cases, world in [(ONE, 1), *WORLDS.values()]:
        results = errors_of(cases, world, Path(tempfile.mkdtemp()), 300)[0]
        for case in cases:
            key = case.engine, case.bits
            ranks[key].add(world)
            for family, error in results[case.label]["worst"].items():
                rows[key][family] = max(rows[key].get(family, 0.0), error)
    print("| engine | precision | ranks |", " | ".join(title for _, title in COLUMNS), "|")
    print("|---" * (3 + len(COLUMNS)) + "|")
    for (engine, bits), worst in sorted(rows.items(), key=lambda row: (row[0][1] != "fp32", row)):
        # Zeros of half precision's underflow have nothing in float64 to be compared with.
        cells = [f"{worst[f]:.0e}" if worst.get(f, math.inf) < 1 else "" for f, _ in COLUMNS]
        where = ", ".join(map(str, sorted(ranks[engine, bits])))
        print(f"| {engine} | {bits} | {where} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()

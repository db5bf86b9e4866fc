"""The run store beside TensorBoard, W&B offline, MLflow on SQLite and Trackio.

    python -m benchmarks.store [--metrics 1000] [--steps 500] [--rounds 3] [--big 100000]
                               [--python trackio=PATH ...]

Each way runs in a process of its own: it writes the same values step by step, flushes each step as
its own users do, closes, and reads one metric back. A way that is not installed is listed as such;
`--python` names another interpreter for a way whose dependencies conflict with ours. `publish` is
what the training thread pays for a step of 10,000 metrics at 100 steps a second. `big` is a run of
10,000 metrics: it is opened and one metric is read while it is being written, and again once it is
compacted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.store_study.runs import measure_big, measure_publish, measure_way
from benchmarks.store_study.ways import WAYS
from benchmarks.tables import spread

_ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--metrics", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--big", type=int, default=100_000, help="steps; 0 leaves it out")
    parser.add_argument("--python", nargs="*", default=[], metavar="WAY=PATH")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(arguments)))
        return
    _compare(arguments)
    _print_publish(_run_child(sys.executable, "publish", arguments))
    if arguments.big:
        _print_big(_run_child(sys.executable, "big", arguments), arguments.big)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.child == "publish":
        return measure_publish()
    if arguments.child == "big":
        return measure_big(arguments.big)
    return measure_way(arguments.child, arguments.metrics, arguments.steps)


def _run_child(python: str, child: str, arguments: argparse.Namespace) -> dict[str, Any]:
    settings = ["--metrics", arguments.metrics, "--steps", arguments.steps, "--big", arguments.big]
    command = [python, "-m", "benchmarks.store", "--child", child, *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    if done.returncode:
        raise SystemExit(f"{child}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compare(arguments: argparse.Namespace) -> None:
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):  # in turn, so that a slow spell of the machine hits all ways
        for way, results in found.items():
            results.append(_run_child(pythons.get(way.lower(), sys.executable), way, arguments))
    count = arguments.metrics * arguments.steps
    print(f"## {arguments.metrics:,} metrics, {arguments.steps:,} steps, flushed at each\n")
    ratios = "time over ours | over ours, not compacted"
    print(f"| way | values/s | {ratios} | bytes/value | read one metric, ms | MB grown |")
    print("|---|---|---|---|---|---|---|")
    for way, results in found.items():
        if "missing" in results[0]:
            print(f"| {way} | not installed: {results[0]['missing']} | | | | | |")
            continue
        times = [
            spread(
                (r["seconds"] / o["seconds"] for r, o in zip(results, ours, strict=True)), ",.1f"
            )
            for ours in (found["ours"], found["ours, not compacted"])
        ]
        reads = [1e3 * r["read"] for r in results if "read" in r]
        print(
            f"| {way} | {spread((count / r['seconds'] for r in results), ',.0f')} "
            f"| {times[0]} | {times[1]} "
            f"| {results[0]['bytes'] / count:.2f} | {spread(reads, ',.1f') if reads else '-'} "
            f"| {spread((r['grown'] / 1e6 for r in results), ',.0f')} |"
        )


def _print_publish(result: dict[str, Any]) -> None:
    print("\n## publish, 100 steps a second for 20 s\n")
    columns = "publish, us | 99 %, us | with making the record, us | late, s | waiting | dropped"
    print(f"| metrics | {columns} | MB grown in the last 10 s |")
    print("|---|---|---|---|---|---|---|---|")
    for metrics, r in result.items():
        times = [1e6 * r[what] for what in ("median", "99 %", "with making")]
        print(
            f"| {int(metrics):,} | {' | '.join(f'{t:.1f}' for t in times)} | {r['late']:.2f} "
            f"| {r['waiting']} | {r['dropped']} | {r['grown'] / 1e6:.0f} |"
        )


def _print_big(result: dict[str, Any], steps: int) -> None:
    print(f"\n## 10,000 metrics, {steps:,} steps\n")
    rate = 10_000 * steps / result["write"]
    print(f"Written in {result['write']:.1f} s ({rate:,.0f} values/s), {result['bytes']:.2f} bytes")
    print(f"a value; compacted in {result['compact']:.1f} s.\n")
    print("| state | open, ms | read one metric, ms | MB grown |")
    print("|---|---|---|---|")
    for state in ("while written", "compacted"):
        opened, read, grown = zip(*result[state], strict=True)
        print(
            f"| {state} | {spread((1e3 * x for x in opened), '.0f')} "
            f"| {spread((1e3 * x for x in read), '.0f')} "
            f"| {spread((x / 1e6 for x in grown), '.0f')} |"
        )


if __name__ == "__main__":
    main()

"""The run store beside TensorBoard, W&B offline, MLflow on SQLite and Trackio.

    python -m benchmarks.store [--metrics 1000] [--steps 500] [--rounds 3] [--big 100000]
                               [--python trackio=PATH ...]

Each way runs in a process of its own, writes the same values step by step, each step flushed as
the way's own users do it, closes, and reads one metric back. A way that is not installed is said to
be so; `--python` names another interpreter for one whose dependencies do not agree with ours.
`publish` is what the training thread pays for a step of 10,000 metrics, and a minute of 100 such
steps a second. `big` is a run of 10,000 metrics: opened and one metric read, while it is being
written, and compacted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Values = np.ndarray
Write = Callable[[Path, list[str], Values], None]
Read = Callable[[Path, str], Sequence[float]]


def names_of(count: int) -> list[str]:
    return [f"grad/norm/param/model.layers.{i // 9}.block.{i % 9}.weight" for i in range(count)]


def values_of(steps: int, metrics: int) -> Values:
    """Every step its own: 24 random bits, as gradients have them."""
    generator = np.random.default_rng(0)
    return generator.lognormal(size=(steps, metrics)).astype(np.float32).astype(np.float64)


# -- the ways ---------------------------------------------------------------------------------


def write_ours(folder: Path, names: list[str], values: Values) -> None:
    _write(folder, names, values)[1].close()


def write_ours_live(folder: Path, names: list[str], values: Values) -> None:
    """What a live run is, and what is left of a killed one."""
    _write(folder, names, values)


def _write(folder: Path, names: list[str], values: Values) -> tuple[Any, Any]:
    from ulysses_monitor.records import Schema, StepRecord
    from ulysses_monitor.store import RunDirectory, StoreSink

    directory = RunDirectory(folder / "run")
    directory.start({})
    sink, schema = StoreSink(directory), Schema(tuple(names))
    for step, row in enumerate(values, 1):
        sink.write(StepRecord(step, time.time(), schema, row))
        sink.flush()
    return directory, sink


def read_ours(folder: Path, name: str) -> Sequence[float]:
    import ulysses_monitor as um

    return um.open_run(folder / "run").metrics(name)[name].to_numpy()


def write_tensorboard(folder: Path, names: list[str], values: Values) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "run"))
    for step, row in enumerate(values, 1):
        for name, value in zip(names, row, strict=True):
            writer.add_scalar(name, value, step)
        writer.flush()
    writer.close()


def read_tensorboard(folder: Path, name: str) -> Sequence[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0})
    events.Reload()
    return [scalar.value for scalar in events.Scalars(name)]


def write_wandb(folder: Path, names: list[str], values: Values) -> None:
    import wandb

    settings = wandb.Settings(mode="offline", console="off", silent=True)
    run = wandb.init(project="store", dir=str(folder), settings=settings)
    for step, row in enumerate(values, 1):
        run.log(dict(zip(names, row.tolist(), strict=True)), step=step)
    run.finish()


def write_mlflow(folder: Path, names: list[str], values: Values) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("store", artifact_location=str(folder / "artifacts"))
    run = client.create_run(experiment).info.run_id
    for step, row in enumerate(values, 1):
        now = int(1000 * time.time())
        all_ = [Metric(n, v, now, step) for n, v in zip(names, row.tolist(), strict=True)]
        for first in range(0, len(all_), 1000):  # the most that a batch may hold
            client.log_batch(run, metrics=all_[first : first + 1000])
    client.set_terminated(run)
    (folder / "run_id").write_text(run)


def read_mlflow(folder: Path, name: str) -> Sequence[float]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    history = client.get_metric_history((folder / "run_id").read_text(), name)
    return [metric.value for metric in history]


def write_trackio(_: Path, names: list[str], values: Values) -> None:
    import trackio

    trackio.init(project="store", name="run", auto_log_gpu=False, auto_log_cpu=False)
    for step, row in enumerate(values, 1):
        trackio.log(dict(zip(names, row.tolist(), strict=True)), step=step)
    trackio.finish()


def read_trackio(_: Path, name: str) -> Sequence[float]:
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_metric_values("store", "run", name)
    return [row["value"] for row in rows]


WAYS: dict[str, tuple[str, Write, Read | None]] = {
    "ours": ("pyarrow", write_ours, read_ours),
    "ours, not compacted": ("pyarrow", write_ours_live, read_ours),
    "TensorBoard": ("tensorboard", write_tensorboard, read_tensorboard),
    "W&B offline": ("wandb", write_wandb, None),
    "MLflow on SQLite": ("mlflow.store.tracking.sqlalchemy_store", write_mlflow, read_mlflow),
    "Trackio": ("trackio", write_trackio, read_trackio),
}
"""Name: the package it needs, how it writes, and how it reads one metric, where it can."""


# -- in a process of its own ------------------------------------------------------------------


def measure(way: str, metrics: int, steps: int) -> dict[str, Any]:
    package, write, read = WAYS[way]
    if not _is_installed(package):
        return {"missing": package}
    with tempfile.TemporaryDirectory(prefix="store-") as place:
        folder = Path(place)
        os.environ |= {"TRACKIO_DIR": place, "WANDB_SILENT": "true", "DO_NOT_TRACK": "true"}
        names, values = names_of(metrics), values_of(steps, metrics)
        write_warm(write, names)
        memory = reset_peak()
        began = time.perf_counter()
        write(folder, names, values)
        written = time.perf_counter()
        grown = peak() - memory
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        result = {"seconds": written - began, "bytes": size, "grown": grown}
        if read is not None:
            began = time.perf_counter()
            found = read(folder, names[metrics // 2])
            result["read"] = time.perf_counter() - began
            np.testing.assert_allclose(found, values[:, metrics // 2], rtol=1e-6)
        return result


def write_warm(write: Write, names: list[str]) -> None:
    """Imports and first uses are nobody's speed."""
    with tempfile.TemporaryDirectory(prefix="warm-") as place:
        before = os.environ.get("TRACKIO_DIR")
        if write is not write_trackio:  # which keeps the folder that it first saw
            write(Path(place), names[:2], values_of(2, 2))
        if before is not None:
            os.environ["TRACKIO_DIR"] = before


def reset_peak() -> float:
    """Bytes that are resident now, from where the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Most bytes that were resident; getrusage would count the parent's, too."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * float(status.split("VmHWM:")[1].split()[0])


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def publish() -> dict[str, Any]:
    """What a step of 10,000 metrics costs the training thread, at 100 a second for 20 s."""
    from ulysses_monitor.bus import Bus
    from ulysses_monitor.records import Schema, StepRecord
    from ulysses_monitor.store import RunDirectory, StoreSink

    with tempfile.TemporaryDirectory(prefix="store-") as place:
        result = {}
        for metrics in (10, 10_000):
            directory = RunDirectory(Path(place) / str(metrics))
            directory.start({})
            schema, rows = Schema(tuple(names_of(metrics))), values_of(50, metrics)
            bus = Bus([StoreSink(directory)])
            taken: list[float] = []
            whole: list[float] = []
            memory, due = 0.0, time.perf_counter()
            for step in range(1, 2001):
                began = time.perf_counter()
                record = StepRecord(step, time.time(), schema, rows[step % 50])
                made = time.perf_counter()
                bus.publish(record)
                done = time.perf_counter()
                taken.append(done - made)
                whole.append(done - began)
                due += 0.01
                time.sleep(max(0.0, due - time.perf_counter()))
                if step == 1000:
                    memory = _resident()
            result[str(metrics)] = {
                "median": statistics.median(taken),
                "99 %": float(np.quantile(taken, 0.99)),
                "whole": statistics.median(whole),
                "late": max(0.0, time.perf_counter() - due),
                "waiting": len(bus._workers[0]._queue),
                "grown": _resident() - memory,
                "dropped": bus.dropped()["store"],
            }
            bus.close(60.0)
            directory.finish("finished")
        return result


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def big(steps: int) -> dict[str, Any]:
    """A run of 10,000 metrics: opened and one metric read, before and after compaction."""
    from ulysses_monitor.records import Schema, StepRecord
    from ulysses_monitor.store import RunDirectory, StoreSink, compact

    with tempfile.TemporaryDirectory(prefix="store-") as place:
        run = Path(place) / "run"
        directory = RunDirectory(run)
        directory.start({})
        names, rows = names_of(10_000), values_of(100, 10_000)
        sink, schema = StoreSink(directory), Schema(tuple(names))
        began = time.perf_counter()
        for step in range(1, steps + 1):
            sink.write(StepRecord(step, time.time(), schema, rows[step % 100] + step))
            sink.flush()
        result: dict[str, Any] = {"write": time.perf_counter() - began}
        size = sum(f.stat().st_size for f in (run / "metrics").iterdir())
        result["bytes"] = size / steps / len(names)
        expected = [np.float32(rows[s % 100, 5000] + s) for s in range(1, steps + 1)]
        result["while written"] = [_open_and_read(run, names[5000], expected) for _ in range(5)]
        directory.release()
        began = time.perf_counter()
        compact(run / "metrics")
        result["compact"] = time.perf_counter() - began
        result["compacted"] = [_open_and_read(run, names[5000], expected) for _ in range(5)]
        return result


_ROOT = Path(__file__).resolve().parents[1]

OPEN_AND_READ = """
import sys, time
import pandas, pyarrow.parquet
from benchmarks.store import peak, reset_peak
import ulysses_monitor as um
from ulysses_monitor.store import MetricsReader
um.open_run
memory = reset_peak()
began = time.perf_counter()
run = um.open_run(sys.argv[1])
run.info
names = run.names()
opened = time.perf_counter()
values = run.metrics(sys.argv[2])[sys.argv[2]].to_numpy()
read = time.perf_counter()
grown = peak() - memory
values.astype("f4").tofile(sys.argv[3])
print(opened - began, read - opened, grown)
"""
"""In a process of its own, as a notebook's first cells."""


def _open_and_read(run: Path, name: str, expected: Sequence[float]) -> list[float]:
    out = run.parent / "values"
    command = [
        sys.executable,
        "-c",
        OPEN_AND_READ,
        str(run),
        name,
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    np.testing.assert_array_equal(np.fromfile(out, np.float32), expected)
    return [float(x) for x in done.stdout.split()]


# -- the tables -------------------------------------------------------------------------------


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
        print(json.dumps(_child(arguments)))
        return
    _compare(arguments)
    _show_publish(_start(sys.executable, "publish", arguments))
    if arguments.big:
        _show_big(_start(sys.executable, "big", arguments), arguments.big)


def _child(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.child == "publish":
        return publish()
    if arguments.child == "big":
        return big(arguments.big)
    return measure(arguments.child, arguments.metrics, arguments.steps)


def _start(python: str, child: str, arguments: argparse.Namespace) -> dict[str, Any]:
    settings = ["--metrics", arguments.metrics, "--steps", arguments.steps, "--big", arguments.big]
    command = [python, __file__, "--child", child, *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{child}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compare(arguments: argparse.Namespace) -> None:
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):  # in turn, so that the machine's moods meet all alike
        for way, results in found.items():
            results.append(_start(pythons.get(way.lower(), sys.executable), way, arguments))
    count = arguments.metrics * arguments.steps
    print(f"## {arguments.metrics:,} metrics, {arguments.steps:,} steps, flushed at each\n")
    ratios = "time over ours | over ours, not compacted"
    print(f"| way | values/s | {ratios} | bytes/value | read one metric, ms | MB grown |")
    print("|---|---|---|---|---|---|---|")
    for way, results in found.items():
        if "missing" in results[0]:
            print(f"| {way} | not installed: {results[0]['missing']} | | | | | |")
            continue
        rates = [count / r["seconds"] for r in results]
        times = [
            _spread(
                [r["seconds"] / o["seconds"] for r, o in zip(results, ours, strict=True)], ",.1f"
            )
            for ours in (found["ours"], found["ours, not compacted"])
        ]
        reads = [1e3 * r["read"] for r in results if "read" in r]
        print(
            f"| {way} | {_spread(rates, ',.0f')} | {times[0]} | {times[1]} "
            f"| {results[0]['bytes'] / count:.2f} | {_spread(reads, ',.1f') if reads else '-'} "
            f"| {_spread([r['grown'] / 1e6 for r in results], ',.0f')} |"
        )


def _show_publish(result: dict[str, Any]) -> None:
    print("\n## publish, 100 steps a second for 20 s\n")
    columns = "publish, us | 99 %, us | with making the record, us | late, s | waiting | dropped"
    print(f"| metrics | {columns} | MB grown in the last 10 s |")
    print("|---|---|---|---|---|---|---|---|")
    for metrics, r in result.items():
        times = [1e6 * r[what] for what in ("median", "99 %", "whole")]
        print(
            f"| {int(metrics):,} | {' | '.join(f'{t:.1f}' for t in times)} | {r['late']:.2f} "
            f"| {r['waiting']} | {r['dropped']} | {r['grown'] / 1e6:.0f} |"
        )


def _show_big(result: dict[str, Any], steps: int) -> None:
    print(f"\n## 10,000 metrics, {steps:,} steps\n")
    rate = 10_000 * steps / result["write"]
    print(f"Written in {result['write']:.1f} s ({rate:,.0f} values/s), {result['bytes']:.2f} bytes")
    print(f"a value; compacted in {result['compact']:.1f} s.\n")
    print("| state | open, ms | read one metric, ms | MB grown |")
    print("|---|---|---|---|")
    for state in ("while written", "compacted"):
        opened, read, grown = zip(*result[state], strict=True)
        print(
            f"| {state} | {_spread([1e3 * x for x in opened], '.0f')} "
            f"| {_spread([1e3 * x for x in read], '.0f')} "
            f"| {_spread([x / 1e6 for x in grown], '.0f')} |"
        )


def _spread(values: Sequence[float], form: str) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} [{least:{form}}, {most:{form}}]"


if __name__ == "__main__":
    main()

"""What is measured, each in a process of its own: a way, publishing, and a big run."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_study.memory import read_peak, read_resident, reset_peak
from benchmarks.store_study.ways import WAYS, Write, make_names, make_values, write_trackio

__all__ = ["measure_big", "measure_publish", "measure_way"]

_ROOT = Path(__file__).resolve().parents[2]


def measure_way(way: str, metrics: int, steps: int) -> dict[str, Any]:
    """Writes `steps` of `metrics` values, and reads one metric back."""
    package, write, read = WAYS[way]
    if not _is_installed(package):
        return {"missing": package}
    with tempfile.TemporaryDirectory(prefix="store-") as place:
        folder = Path(place)
        os.environ |= {"TRACKIO_DIR": place, "WANDB_SILENT": "true", "DO_NOT_TRACK": "true"}
        names, values = make_names(metrics), make_values(steps, metrics)
        _warm_up(write, names)
        memory = reset_peak()
        began = time.perf_counter()
        write(folder, names, values)
        written = time.perf_counter()
        grown = read_peak() - memory
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        result = {"seconds": written - began, "bytes": size, "grown": grown}
        if read is not None:
            began = time.perf_counter()
            found = read(folder, names[metrics // 2])
            result["read"] = time.perf_counter() - began
            np.testing.assert_allclose(found, values[:, metrics // 2], rtol=1e-6)
        return result


def _warm_up(write: Write, names: list[str]) -> None:
    """Writes a little first, so that imports and first uses are not timed."""
    with tempfile.TemporaryDirectory(prefix="warm-") as place:
        before = os.environ.get("TRACKIO_DIR")
        if write is not write_trackio:  # it keeps the folder that it sees first
            write(Path(place), names[:2], make_values(2, 2))
        if before is not None:
            os.environ["TRACKIO_DIR"] = before


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def measure_publish() -> dict[str, Any]:
    """Publishes 10 and 10,000 metrics a step, 100 steps a second for 20 s."""
    with tempfile.TemporaryDirectory(prefix="store-") as place:
        return {str(n): _publish(Path(place) / str(n), n) for n in (10, 10_000)}


def _publish(run: Path, metrics: int) -> dict[str, Any]:
    from ulysses_monitor.bus import Bus
    from ulysses_monitor.records import Schema, StepRecord
    from ulysses_monitor.store import RunDirectory, StoreSink

    directory = RunDirectory(run)
    directory.start({})
    schema, rows = Schema(tuple(make_names(metrics))), make_values(50, metrics)
    bus = Bus([StoreSink(directory)])
    publishing: list[float] = []
    with_making: list[float] = []
    memory, due = 0.0, time.perf_counter()
    for step in range(1, 2001):
        began = time.perf_counter()
        record = StepRecord(step, time.time(), schema, rows[step % 50])
        made = time.perf_counter()
        bus.publish(record)
        done = time.perf_counter()
        publishing.append(done - made)
        with_making.append(done - began)
        due += 0.01
        time.sleep(max(0.0, due - time.perf_counter()))
        if step == 1000:
            memory = read_resident()
    result = {
        "median": statistics.median(publishing),
        "99 %": float(np.quantile(publishing, 0.99)),
        "with making": statistics.median(with_making),
        "late": max(0.0, time.perf_counter() - due),
        "waiting": len(bus._workers[0]._queue),
        "grown": read_resident() - memory,
        "dropped": bus.dropped()["store"],
    }
    bus.close(60.0)
    directory.finish("finished")
    return result


def measure_big(steps: int) -> dict[str, Any]:
    """Opens a run of 10,000 metrics and reads one metric, before and after compaction."""
    from ulysses_monitor.records import Schema, StepRecord
    from ulysses_monitor.store import RunDirectory, StoreSink, compact

    with tempfile.TemporaryDirectory(prefix="store-") as place:
        run = Path(place) / "run"
        directory = RunDirectory(run)
        directory.start({})
        names, rows = make_names(10_000), make_values(100, 10_000)
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


OPEN_AND_READ = """
import sys, time
import pandas, pyarrow.parquet
from benchmarks.store_study.memory import read_peak, reset_peak
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
grown = read_peak() - memory
values.astype("f4").tofile(sys.argv[3])
print(opened - began, read - opened, grown)
"""
"""Run in a process of its own, as the first cells of a notebook are."""


def _open_and_read(run: Path, name: str, expected: Sequence[float]) -> list[float]:
    """Returns the seconds to open, the seconds to read, and the bytes that memory grew by."""
    out = run.parent / "values"
    command = [sys.executable, "-c", OPEN_AND_READ, str(run), name, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    np.testing.assert_array_equal(np.fromfile(out, np.float32), expected)
    return [float(x) for x in done.stdout.split()]

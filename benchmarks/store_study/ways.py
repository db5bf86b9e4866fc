"""Ways to keep metrics: this project's and others', each as its own users write it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["WAYS", "Read", "Write", "make_names", "make_values", "write_trackio"]

Values = np.ndarray
Write = Callable[[Path, list[str], Values], None]
Read = Callable[[Path, str], Sequence[float]]


def make_names(count: int) -> list[str]:
    return [f"grad/norm/param/model.layers.{i // 9}.block.{i % 9}.weight" for i in range(count)]


def make_values(steps: int, metrics: int) -> Values:
    """Every value has 24 random bits, as gradients do [steps, metrics]."""
    generator = np.random.default_rng(0)
    return generator.lognormal(size=(steps, metrics)).astype(np.float32).astype(np.float64)


def write_ours(folder: Path, names: list[str], values: Values) -> None:
    _write(folder, names, values)[1].close()


def write_ours_live(folder: Path, names: list[str], values: Values) -> None:
    """Leaves the run as it is while it trains, and after it was killed."""
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
"""By name: the package that a way needs, how it writes, and how it reads one metric if it can."""

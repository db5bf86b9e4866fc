"""Reads what the report shows of a run's metrics, in memory that does not grow with the run.

A few metrics have a line over all steps. Of layers, a chart shows the largest value in each of its
columns; of parameters and LoRA modules, tables show the last steps. So those are read some at a
time, and only what is shown is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from ulysses_monitor.reading import (
    RunReader,
    hide_partial_norms,
    make_name_filter,
    read_columns,
    read_windows,
)
from ulysses_monitor.records.layer_grid import LayerGrid
from ulysses_monitor.records.layers import order_layers
from ulysses_monitor.records.nonfinite import COUNT, pair_norms
from ulysses_monitor.records.trainer_names import MEASURED
from ulysses_monitor.report.band import Band, build_band
from ulysses_monitor.report.layers import MAX_COLUMNS
from ulysses_monitor.report.tables import GRADIENT, LAST_STEPS, RATIO

__all__ = ["Recorded", "find_logged", "read_recorded"]

_NORM = "grad/norm/total"
_LINES = (
    *("train/loss/total", "train/step_seconds/total", "train/tokens_per_second/total"),
    *("eval/loss/total", _NORM, "grad/clip_coef/total", "lora/grad_ratio_B_A/total"),
    *("optim/exp_avg_norm/total", "optim/exp_avg_sq_mean/total", "monitor/overhead_seconds/total"),
    *("system/host_memory_bytes/total", "system/device_memory_peak_bytes/total"),
)
_LAYERED = ("grad/norm", "optim/exp_avg_norm", "optim/exp_avg_sq_mean")
_OTHERS = ("train/*", "grad/norm/*", "lora/grad_ratio_B_A/*")
"""Metrics whose steps count as steps of the run, whether or not they are shown."""
_MARKED = ("grad/norm/", "train/loss/")
"""Metrics of which the page shows where they are NaN or Inf."""
_OWN_FAMILIES = ("grad", "param", "optim", "lora", "sp", "eval", "monitor", "system")
"""Families whose metrics the monitor measures, or that have a place of their own in the report."""
_MAX_LOGGED, _MAX_RATES, _MAX_EVALUATIONS = 24, 4, 500

Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recorded:
    """The metrics that the report shows.

    Loss and gradient norms are infinite wherever they are not finite, because NaN is also what was
    not recorded.

    Attributes:
        frame: metrics that have a line, over all steps of the run.
        layers: the grid of each metric of layers, by its family and stat.
        band: the range of the LoRA modules' gradient ratios; None for fewer than two modules.
        gradients: ``grad/norm/param/*`` and ``grad/norm/total`` of the last steps that have them.
        ratios: ``lora/grad_ratio_B_A/module/*`` of the last steps that have them.
        evaluations: ``eval/*`` of the first steps that have them.
    """

    frame: pd.DataFrame
    layers: dict[str, LayerGrid] = field(default_factory=dict)
    band: Band | None = None
    gradients: pd.DataFrame = field(default_factory=pd.DataFrame)
    ratios: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluations: pd.DataFrame = field(default_factory=pd.DataFrame)


def find_logged(names: Iterable[str]) -> list[str]:
    """Returns the metrics that a Trainer or the user's own code logged, at most `_MAX_LOGGED`."""
    logged = [
        name
        for name in sorted(names)
        if name.endswith("/total")
        and name.split("/", 1)[0] not in _OWN_FAMILIES
        and name not in MEASURED
    ]
    return logged[:_MAX_LOGGED]


def read_recorded(run: RunReader) -> Recorded:
    """Reads the metrics that the report shows."""
    pieces = _Pieces(run)
    lines = {*_LINES, *find_logged(pieces.names)}
    frame = _join(pieces.read([name for name in pieces.names if name in lines]))
    rates = _find_distinct_rates(pieces.read(pieces.match("optim/lr/*")))
    layers = {metric: grid for metric in _LAYERED if (grid := _read_grid(pieces, metric))}
    gradients = _join(f.tail(LAST_STEPS) for f in pieces.read_rows(f"{GRADIENT}*"))
    ratios = _join(f.tail(LAST_STEPS) for f in pieces.read_rows(f"{RATIO}*")).tail(LAST_STEPS)
    evaluations = _join(f.head(_MAX_EVALUATIONS) for f in pieces.read_rows("eval/*"))
    pieces.read_steps(*_OTHERS)
    index = pd.Index(pieces.steps, name="step")
    return Recorded(
        frame.join(rates, how="outer").reindex(index),
        layers,
        build_band(pieces.read_windows(f"{RATIO}*")),
        gradients.tail(LAST_STEPS).join(frame[[name for name in frame.columns if name == _NORM]]),
        ratios,
        evaluations.head(_MAX_EVALUATIONS),
    )


class _Pieces:
    """Reads a run piece by piece, as frames.

    Attributes:
        names: of all metrics.
        steps: each step of which a metric was read, ascending [N].
    """

    def __init__(self, run: RunReader) -> None:
        self._run = run
        self.names = run.names()
        self.steps: Steps = np.zeros(0, np.int64)
        self._read: set[str] = set()
        counts = np.asarray(run.block(COUNT, missing="ignore").values)
        norms, of_norms = pair_norms(self.names) if (counts > 0).any() else ([], [])
        pairs = zip(norms, of_norms, strict=True)
        self._counts = {self.names[norm]: self.names[count] for norm, count in pairs}

    def match(self, *patterns: str) -> list[str]:
        return list(filter(make_name_filter(patterns), self.names))

    def read(self, names: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Yields all steps of some metrics at a time."""
        self._read.update(names)
        for block in read_columns(self._run, names, beside=self._counts):
            block = hide_partial_norms(block)
            kept = [i for i, name in enumerate(block.names) if name in self._read]
            block = block.select(kept)
            marked = np.array([name.startswith(_MARKED) for name in block.names], bool)
            values = np.array(block.values, np.float64)
            values[block.present & ~np.isfinite(values) & marked] = np.inf
            self.steps = np.union1d(self.steps, block.steps)
            yield _to_frame(block.steps, values, block.names)

    def read_rows(self, *patterns: str) -> Iterator[pd.DataFrame]:
        """Yields the rows of some metrics at a time that have a value."""
        for frame in self.read(self.match(*patterns)):
            yield frame.dropna(how="all")

    def read_windows(self, *patterns: str) -> Iterator[pd.DataFrame]:
        """Yields some steps at a time of all metrics that match."""
        for block in read_windows(self._run, self.match(*patterns)):
            yield _to_frame(block.steps, np.array(block.values, np.float64), block.names)

    def read_steps(self, *patterns: str) -> None:
        """Adds the steps of the metrics that were not read yet."""
        for _ in self.read([name for name in self.match(*patterns) if name not in self._read]):
            pass


def _to_frame(steps: Steps, values: npt.NDArray[np.float64], names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(values, index=pd.Index(steps, name="step"), columns=list(names))


def _join(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Joins frames of different metrics by step, ascending."""
    found = list(frames)
    if not found:
        return pd.DataFrame(index=pd.Index([], dtype=np.int64, name="step"))
    return pd.concat(found, axis=1).sort_index()


def _find_distinct_rates(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Returns the first learning rates that differ, which are those that a chart shows."""
    found: list[pd.Series[float]] = []
    for frame in frames:
        for name in frame.columns:
            rate = frame[name]
            known = any(rate.equals(other) for other in found)
            if len(found) < _MAX_RATES and np.isfinite(rate).any() and not known:
                found.append(rate)
    return _join([rate.to_frame() for rate in found])


def _read_grid(pieces: _Pieces, metric: str) -> LayerGrid | None:
    """Reads the grid of the ``<metric>/layer/*`` metrics, some layers at a time."""
    prefix = f"{metric}/layer/"
    scopes = [name.removeprefix(prefix) for name in pieces.match(f"{prefix}*")]
    names = {f"{prefix}{layer}": layer for layer in order_layers(scopes)}
    steps = np.zeros(0, np.int64)
    for frame in pieces.read(list(names)):
        steps = np.union1d(steps, frame.dropna(how="all").index)
    if not len(steps):
        return None
    return LayerGrid.join(
        [
            LayerGrid.from_table(
                tuple(names[name] for name in frame.columns),
                steps,
                frame.reindex(steps).to_numpy(),
                most_columns=MAX_COLUMNS,
            )
            for frame in pieces.read(list(names))
        ]
    )

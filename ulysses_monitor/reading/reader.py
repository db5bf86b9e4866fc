"""Opens a run, finished or alive, as pandas frames."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.downsampling import keep_extremes
from ulysses_monitor.reading.selection import Steps, Times, matching, rows_of, select_rows
from ulysses_monitor.reading.sources import Source, find_source
from ulysses_monitor.store import Block, Location

__all__ = ["RunReader", "open_run"]

_LOG = logging.getLogger(__name__)


def open_run(place: str | os.PathLike[str]) -> RunReader:
    """Opens the run at a path or URL.

    Args:
        place: a run directory, a folder of TensorBoard event files, or what a Hugging Face Trainer
            left: its ``output_dir``, a checkpoint or a trainer_state.json. A URL such as
            ``s3://bucket/runs/sft`` needs what fsspec names for it (``s3fs``, ``gcsfs``, ...).

    Raises:
        InputError: there is no run there, or it cannot be read.
    """
    source = find_source(place)
    given, local = Path(place), source.folder.local
    if local is not None and given.exists():  # as it was given: a relative path stays one
        local = given if given.is_dir() else given.parent
    return RunReader(source, local)


class RunReader:
    """A run's metrics, events and description; reads files at each call, so it follows a live run.

    Args:
        source: where it is read from.
        path: its folder on this machine, None where it lies elsewhere.
    """

    def __init__(self, source: Source, path: Path | None) -> None:
        self._source = source
        self._path = path
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<RunReader {self}>"

    def __str__(self) -> str:
        return str(self._path or self.location)

    @property
    def location(self) -> Location:
        """The folder that holds the run, here or at a URL."""
        return self._source.folder

    @property
    def path(self) -> Path:
        """The folder that holds the run on this machine.

        Raises:
            InputError: the run lies at a URL.
        """
        if self._path is None:
            raise InputError(f"run {self.location}: is not on this machine, so nothing is written")
        return self._path

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says: config, model, engine, versions, status.

        Of other sources what they have; `name` and `status` always.
        """
        return self._source.info()

    @property
    def damaged(self) -> Mapping[str, str]:
        """Files that the last call could not read, or not whole, and why."""
        return self._source.damaged

    def names(self, *patterns: str) -> list[str]:
        """Names of the metrics that match one of the shell-style `patterns`; all if none."""
        return list(filter(matching(patterns), self._source.names()))

    def metrics(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
    ) -> pd.DataFrame:
        """Metrics by shell-style patterns, such as ``"grad/norm/layer/*"``; all if none is given.

        Args:
            patterns: names, or patterns of names, in which ``*`` also matches ``/``.
            steps: ``(first, last)``, both included; None is no limit.
            times: ``(first, last)`` in seconds since the epoch, as datetimes or as ISO strings; a
                time without a zone is of this machine's.
            points: at most so many rows, which hold each metric's extremes: see
                `ulysses_monitor.reading.downsampling.keep_extremes`.

        Returns:
            A frame indexed by `step`, a float64 column per metric in the order of the run's schema.
            A step that was trained twice is served once, from the later training; a metric that is
            sampled each N steps is NaN in between.

        Raises:
            InputError: a limit cannot be read, or `points` cannot hold the extremes.
        """
        return to_frame(self.block(*patterns, steps=steps, times=times, points=points))

    def block(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
    ) -> Block:
        """As `metrics`, as arrays: also with times, and what was measured and is NaN."""
        block = select_rows(self._source.read(matching(patterns)), steps, times)
        self._warn()
        return block if points is None else rows_of(block, keep_extremes(block, points))

    def times(self, *patterns: str) -> pd.Series[float]:
        """Seconds since the epoch at which each step was recorded, indexed by `step`.

        Args:
            patterns: only steps that have one of these metrics, which is quicker than all.
        """
        block = self.block(*patterns)
        return pd.Series(block.times, index=pd.Index(block.steps, name="step"), name="time")

    def events(self, kind: str | None = None) -> pd.DataFrame:
        """Events, of one `kind` or all, a row each, with the columns that the events carry."""
        rows = self.event_list(kind)
        return pd.DataFrame(rows, columns=None if rows else ["kind", "step", "time"])

    def event_list(self, kind: str | None = None) -> list[dict[str, Any]]:
        """As `events`, each with its own keys only."""
        return [e for e in self._source.events() if kind is None or e["kind"] == kind]

    def alerts(self) -> pd.DataFrame:
        """Events of kind ``alert``."""
        return self.events("alert")

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers: steps, losses, speed, norms, LoRA ratio, alerts, cost.

        A number that the run did not record is None.
        """
        frame = self.metrics(
            "train/*", "eval/loss/*", "grad/norm/total", "lora/*/total", "monitor/*"
        )
        info = self.info
        loss, held_out = _column(frame, "train/loss/total"), _column(frame, "eval/loss/total")
        ratio = _column(frame, "lora/grad_ratio_B_A/total")
        seconds = _column(frame, "train/step_seconds/total")
        overhead = _column(frame, "monitor/overhead_seconds/total")
        return {
            "name": info["name"],
            "status": info["status"],
            "engine": info.get("engine"),
            "world_size": info.get("world_size"),
            "steps": self._last_step(frame),
            "loss_first": _mean(loss.head(5)),
            "loss_last": _mean(loss.tail(5)),
            "eval_loss_first": _at(held_out, 0),
            "eval_loss_last": _at(held_out, -1),
            "tokens_per_second": _median(_column(frame, "train/tokens_per_second/total")),
            "grad_norm_first": _mean(_column(frame, "grad/norm/total").head(5)),
            "grad_norm_last": _mean(_column(frame, "grad/norm/total").tail(5)),
            "lora_ratio_first": _at(ratio, 0),
            "lora_ratio_last": _at(ratio, -1),
            "alerts": len(self.alerts()),
            "monitor_share": _share(overhead.sum(), seconds.sum()),
        }

    def _last_step(self, frame: pd.DataFrame) -> int:
        """The last of `frame`, or of all metrics where the run has none of those."""
        steps = frame.index if len(frame) else self.times().index
        return int(steps.max()) if len(steps) else 0

    def _warn(self) -> None:
        for name, reason in self.damaged.items():
            if name not in self._warned:
                self._warned.add(name)
                _LOG.warning(
                    "%s: %s is damaged and the rest is served: %s", self.location, name, reason
                )


def to_frame(block: Block) -> pd.DataFrame:
    """A block as a frame indexed by `step`."""
    index = pd.Index(block.steps, name="step")
    return pd.DataFrame(block.values, index=index, columns=list(block.names), dtype="float64")


def _column(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    return frame[name].dropna() if name in frame else pd.Series(dtype="float64")


def _at(series: pd.Series[float], i: int) -> float | None:
    return float(series.iloc[i]) if len(series) else None


def _mean(series: pd.Series[float]) -> float | None:
    return float(series.mean()) if len(series) else None


def _median(series: pd.Series[float]) -> float | None:
    return float(series.median()) if len(series) else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole and math.isfinite(part) and math.isfinite(whole) else None

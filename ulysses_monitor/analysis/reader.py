"""Opens a run directory, finished or alive, as pandas frames."""

from __future__ import annotations

import fnmatch
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from ulysses_monitor.errors import InputError
from ulysses_monitor.store import is_locked, merge, read_blocks

__all__ = ["RunReader", "open_run"]


def open_run(path: str | Path) -> RunReader:
    """Opens the run directory at `path`.

    Raises:
        InputError: there is no run there.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise InputError(f"run {path}: no run.json there; name a run directory such as runs/sft")
    return RunReader(path)


class RunReader:
    """A run's metrics, events and description; reads files at each call, so it follows a live run.

    Attributes:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says: config, model, engine, versions, status."""
        info: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        if info.get("status") == "running" and not is_locked(self.path):
            info["status"] = "crashed"
        return info

    def metrics(self, *patterns: str) -> pd.DataFrame:
        """Metrics by shell-style patterns, such as ``"grad/norm/layer/*"``; all if none is given.

        Returns:
            A frame indexed by `step`, a column per metric in the order of the run's schema. A step
            that was trained twice is served once, from the later training; a metric that is
            sampled each N steps is NaN in between.
        """

        def wanted(name: str) -> bool:
            return not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)

        served = merge([b for b in read_blocks(self.path / "metrics", wanted) if b.names])
        return pd.DataFrame(
            served.values,
            index=pd.Index(served.steps, name="step"),
            columns=list(served.names),
            dtype="float64",
        )

    def events(self, kind: str | None = None) -> pd.DataFrame:
        """Events, of one `kind` or all, a row each, with the columns that the events carry."""
        rows = []
        path = self.path / "events.jsonl"
        # Bytes, and split at newlines only: a torn line may end within a character, and messages
        # may hold what Python else takes for the end of a line.
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the torn last line of a run that was killed
            if kind is None or row["kind"] == kind:
                rows.append(row)
        return pd.DataFrame(rows, columns=None if rows else ["kind", "step", "time"])

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers: steps, losses, speed, norms, LoRA ratio, alerts, cost.

        A number that the run did not record is None.
        """
        frame = self.metrics(
            "train/*", "eval/loss/*", "grad/norm/total", "lora/*/total", "monitor/*"
        )
        loss, held_out = _column(frame, "train/loss/total"), _column(frame, "eval/loss/total")
        ratio = _column(frame, "lora/grad_ratio_B_A/total")
        seconds = _column(frame, "train/step_seconds/total")
        overhead = _column(frame, "monitor/overhead_seconds/total")
        return {
            "name": self.info["name"],
            "status": self.info["status"],
            "engine": self.info.get("engine"),
            "world_size": self.info.get("world_size"),
            "steps": int(frame.index.max()) if len(frame) else 0,
            "loss_first": _mean(loss.head(5)),
            "loss_last": _mean(loss.tail(5)),
            "eval_loss_first": _at(held_out, 0),
            "eval_loss_last": _at(held_out, -1),
            "tokens_per_second": _median(_column(frame, "train/tokens_per_second/total")),
            "grad_norm_first": _mean(_column(frame, "grad/norm/total").head(5)),
            "grad_norm_last": _mean(_column(frame, "grad/norm/total").tail(5)),
            "lora_ratio_first": _at(ratio, 0),
            "lora_ratio_last": _at(ratio, -1),
            "alerts": len(self.events("alert")),
            "monitor_share": _share(overhead.sum(), seconds.sum()),
        }


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

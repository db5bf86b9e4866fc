"""A run in the numbers that people compare: before and after, speed, and the monitor's cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from ulysses_monitor.reading.reader import RunReader

__all__ = ["summarize"]

_PATTERNS = ("train/*", "eval/loss/*", "grad/norm/total", "lora/*/total", "monitor/*")


def summarize(run: RunReader) -> dict[str, Any]:
    """Summarizes a run; see `RunReader.summary`."""
    frame, info = run.metrics(*_PATTERNS, missing="ignore"), run.info
    loss, held_out = _column(frame, "train/loss/total"), _column(frame, "eval/loss/total")
    norm, ratio = _column(frame, "grad/norm/total"), _column(frame, "lora/grad_ratio_B_A/total")
    seconds = _column(frame, "train/step_seconds/total")
    overhead = _column(frame, "monitor/overhead_seconds/total")
    return {
        "name": info["name"],
        "status": info["status"],
        "engine": info.get("engine"),
        "world_size": info.get("world_size"),
        "steps": _last_step(run, frame),
        "loss_first": _mean(loss.head(5)),
        "loss_last": _mean(loss.tail(5)),
        "eval_loss_first": _value_at(held_out, 0),
        "eval_loss_last": _value_at(held_out, -1),
        "tokens_per_second": _median(_column(frame, "train/tokens_per_second/total")),
        "grad_norm_first": _mean(norm.head(5)),
        "grad_norm_last": _mean(norm.tail(5)),
        "lora_ratio_first": _value_at(ratio, 0),
        "lora_ratio_last": _value_at(ratio, -1),
        "alerts": len(run.alerts()),
        "monitor_share": _share(overhead.sum(), seconds.sum()),
    }


def _last_step(run: RunReader, frame: pd.DataFrame) -> int:
    """Returns the last step of `frame`, or of all metrics if `frame` is empty."""
    steps = frame.index if len(frame) else run.times().index
    return int(steps.max()) if len(steps) else 0


def _column(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    return frame[name].dropna() if name in frame else pd.Series(dtype="float64")


def _value_at(series: pd.Series[float], i: int) -> float | None:
    return float(series.iloc[i]) if len(series) else None


def _mean(series: pd.Series[float]) -> float | None:
    return float(series.mean()) if len(series) else None


def _median(series: pd.Series[float]) -> float | None:
    return float(series.median()) if len(series) else None


def _share(part: float, total: float) -> float | None:
    return part / total if total and math.isfinite(part) and math.isfinite(total) else None

"""A run in the numbers that people compare: before and after, speed, and the monitor's cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ulysses_monitor.reading.chunks import find_last_step
from ulysses_monitor.reading.nonfinite import hide_partial_norms
from ulysses_monitor.records.nonfinite import COUNT
from ulysses_monitor.store import Block

if TYPE_CHECKING:
    from ulysses_monitor.reading.reader import RunReader

__all__ = ["summarize"]

_NAMES = (
    *("train/loss/total", "eval/loss/total", "grad/norm/total", COUNT),
    *("lora/grad_ratio_B_A/total", "train/step_seconds/total", "train/tokens_per_second/total"),
    "monitor/overhead_seconds/total",
)
_PATTERNS = ("train/*", "eval/loss/*", "grad/norm/total", COUNT, "lora/*/total", "monitor/*")
"""Metrics of which each belongs to a step that was done."""


def summarize(run: RunReader) -> dict[str, Any]:
    """Summarizes a run; see `RunReader.summary`."""
    block, info = hide_partial_norms(run.block(*_NAMES, missing="ignore")), run.info
    loss, held_out = _column(block, "train/loss/total"), _column(block, "eval/loss/total")
    norm, ratio = _column(block, "grad/norm/total"), _column(block, "lora/grad_ratio_B_A/total")
    seconds = _column(block, "train/step_seconds/total")
    overhead = _column(block, "monitor/overhead_seconds/total")
    return {
        "name": info["name"],
        "status": info["status"],
        "engine": info.get("engine"),
        "world_size": info.get("world_size"),
        "steps": _last_step(run),
        "loss_first": _mean(loss.head(5)),
        "loss_last": _mean(loss.tail(5)),
        "eval_loss_first": _value_at(held_out, 0),
        "eval_loss_last": _value_at(held_out, -1),
        "tokens_per_second": _median(_column(block, "train/tokens_per_second/total")),
        "grad_norm_first": _mean(norm.head(5)),
        "grad_norm_last": _mean(norm.tail(5)),
        "lora_ratio_first": _value_at(ratio, 0),
        "lora_ratio_last": _value_at(ratio, -1),
        "alerts": len(run.alerts()),
        "monitor_share": _share(overhead.sum(), seconds.sum()),
    }


def _last_step(run: RunReader) -> int:
    """Returns the last step that was done or, if nothing tells, that has any metric."""
    last = find_last_step(run, run.names(*_PATTERNS))
    return (find_last_step(run, run.names()) or 0) if last is None else last


def _column(block: Block, name: str) -> pd.Series[float]:
    """Returns the values that were measured, NaN among them."""
    if name not in block.names:
        return pd.Series(dtype="float64")
    column = block.names.index(name)
    values = np.asarray(block.values, np.float64)[:, column]
    return pd.Series(values[block.present[:, column]])


def _value_at(series: pd.Series[float], i: int) -> float | None:
    return float(series.iloc[i]) if len(series) else None


def _mean(series: pd.Series[float]) -> float | None:
    """Returns the mean, NaN if one of the values is: pandas would leave that one out."""
    return float(np.mean(series.to_numpy())) if len(series) else None


def _median(series: pd.Series[float]) -> float | None:
    return float(series.median()) if len(series) else None


def _share(part: float, total: float) -> float | None:
    return part / total if total and math.isfinite(part) and math.isfinite(total) else None

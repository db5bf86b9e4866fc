"""Reads the metrics that the report shows."""

from __future__ import annotations

import glob

import numpy as np
import pandas as pd

from ulysses_monitor.reading import RunReader, hide_partial_norms
from ulysses_monitor.records.nonfinite import COUNT
from ulysses_monitor.report.sections import find_logged

__all__ = ["read_frame"]

_METRICS = (
    "train/*",
    "eval/*",
    "grad/norm/*",
    "grad/clip_coef/total",
    "lora/grad_ratio_B_A/*",
    "optim/lr/*",
    "optim/exp_avg_norm/total",
    "optim/exp_avg_norm/layer/*",
    "optim/exp_avg_sq_mean/total",
    "optim/exp_avg_sq_mean/layer/*",
    "monitor/overhead_seconds/total",
    "system/*",
)

_COUNTS = "grad/nonfinite/*"
_MARKED = ("grad/norm/", "train/loss/")
"""Metrics of which the page shows where they are NaN or Inf."""


def read_frame(run: RunReader) -> pd.DataFrame:
    """Reads a frame in which loss and gradient norms are infinite wherever they are not finite.

    In a frame, NaN is also what was not recorded.
    """
    counts = np.asarray(run.block(COUNT, missing="ignore").values)
    is_broken = bool((counts > 0).any())
    logged = map(glob.escape, find_logged(run.names()))
    patterns = [*_METRICS, *logged, *([_COUNTS] if is_broken else [])]
    block = run.block(*patterns, missing="ignore")
    block = hide_partial_norms(block)
    marked = np.array([name.startswith(_MARKED) for name in block.names], bool)
    values = np.array(block.values, np.float64)
    values[block.present & ~np.isfinite(values) & marked] = np.inf
    index = pd.Index(block.steps, name="step")
    frame = pd.DataFrame(values, index=index, columns=list(block.names))
    return frame[[name for name in block.names if not name.startswith("grad/nonfinite/")]]

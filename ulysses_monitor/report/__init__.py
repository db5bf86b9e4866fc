"""The report of a recorded run, and the charts and tables that it is made of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ulysses_monitor.common.extras import explain_missing
from ulysses_monitor.report.tables import (
    find_largest_gradients,
    find_most_unbalanced,
    summarize_actions,
)

if TYPE_CHECKING:
    from ulysses_monitor.report.layers import plot_layers
    from ulysses_monitor.report.page import write_report
    from ulysses_monitor.report.plots import plot_gradient_norm, plot_lora, plot_loss, plot_metric

# Imported when asked for: they need matplotlib, which the tables do not.
_HOMES = {
    "plot_gradient_norm": "plots",
    "plot_layers": "layers",
    "plot_lora": "plots",
    "plot_loss": "plots",
    "plot_metric": "plots",
    "write_report": "page",
}

__all__ = [
    "find_largest_gradients",
    "find_most_unbalanced",
    "plot_gradient_norm",
    "plot_layers",
    "plot_lora",
    "plot_loss",
    "plot_metric",
    "summarize_actions",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        with explain_missing("report"):
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

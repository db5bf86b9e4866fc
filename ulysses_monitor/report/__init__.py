"""The report of a recorded run, and the charts and tables that it is made of."""

from ulysses_monitor.report.layers import plot_layers
from ulysses_monitor.report.page import write_report
from ulysses_monitor.report.plots import plot_gradient_norm, plot_lora, plot_loss, plot_metric
from ulysses_monitor.report.tables import (
    find_largest_gradients,
    find_most_unbalanced,
    summarize_actions,
)

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

"""Pictures of a diagnosis: the metrics that its findings are about, with their alerts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ulysses_monitor.diagnosis.checks import group_reasons
from ulysses_monitor.diagnosis.curves import Curve, find_metric
from ulysses_monitor.diagnosis.diagnose import Diagnosis
from ulysses_monitor.reading import charts
from ulysses_monitor.report.html import check_target, render_page, write_page
from ulysses_monitor.report.svg import to_svg

__all__ = ["draw_diagnosis", "write_diagnosis_page", "write_picture"]

_MOST = 5
"""Metrics that are drawn."""


@charts.with_own_style
def draw_diagnosis(diagnosis: Diagnosis) -> Figure | None:
    """Draws the metrics of the findings, the probable cause's first; None if there is none."""
    drawn = list(_choose(diagnosis))
    if not drawn:
        return None
    figure, axes = charts.stack_axes(*[1.6] * len(drawn), margin=0.1)
    span = pd.Index(sorted({step for curve, _ in drawn for step in curve.steps}), name="step")
    for ax, (curve, alerts) in zip(axes, drawn, strict=True):
        series = pd.Series(curve.values, pd.Index(curve.steps, name="step"))
        finite = series[np.isfinite(series)]
        charts.fit_step_axis(ax, span)
        charts.draw_line(ax, series, charts.BLUE, smooth=False)
        if len(finite):
            charts.choose_y_scale(ax, finite)
        broken = series.index[~np.isfinite(series)].tolist()
        charts.mark_steps(ax, broken, charts.RED, "NaN or Inf")
        charts.mark_alerts(ax, alerts)
        charts.set_title(ax, charts.escape_math(curve.metric))
        charts.add_legend(ax)
    return figure


def _choose(diagnosis: Diagnosis) -> Iterator[tuple[Curve, Sequence[int]]]:
    """Yields the curves to draw, each with the steps of the alerts about it."""
    names, alerts = frozenset(diagnosis.curves), dict[str, list[int]]()
    for chain in diagnosis.chains:
        for finding in (chain.root, *chain.followers):
            if metric := find_metric(finding, names):
                alerts.setdefault(metric, []).append(finding.step)
    for metric in list(dict.fromkeys([*alerts, *diagnosis.curves]))[:_MOST]:
        yield diagnosis.curves[metric], alerts.get(metric, [])


def write_picture(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the picture of `draw_diagnosis`; the format follows from the file's name.

    Raises:
        InputError: the file cannot be written, or the run has no metric to draw.
    """
    charts.save_figure("diagnose", draw_diagnosis(diagnosis), path)


def write_diagnosis_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes a diagnosis as one self-contained page.

    Raises:
        InputError: the file cannot be written.
    """
    check_target("diagnose", path, "diagnosis.html")
    write_page(path, render_page("diagnosis.html.j2", _context(diagnosis)))


def _context(diagnosis: Diagnosis) -> dict[str, Any]:
    figure = draw_diagnosis(diagnosis)
    return {
        "d": diagnosis,
        "svg": "" if figure is None else to_svg(figure, "diagnosis"),
        "unchecked": group_reasons(diagnosis.checks.unchecked),
    }

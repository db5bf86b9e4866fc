"""The charts show what was recorded, or nothing; SVG is safe to combine in a page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tests.monitor.report.recorded import make_run
from ulysses_monitor.reading import RunReader
from ulysses_monitor.reading.charts import thin_out
from ulysses_monitor.report import (
    plot_gradient_norm,
    plot_layers,
    plot_lora,
    plot_loss,
    plot_metric,
)
from ulysses_monitor.report.layers import build_layer_grid
from ulysses_monitor.report.svg import to_svg


def test_charts_are_none_if_there_is_nothing_to_draw(tmp_path: Path) -> None:
    frame = make_run(tmp_path / "r", [{"a/b/c": 1.0}]).metrics()
    assert plot_loss(frame) is None
    assert plot_gradient_norm(frame) is None
    assert plot_lora(frame) is None
    assert plot_layers(frame) is None
    assert plot_metric(frame, "train/loss/total", "Loss") is None


def test_the_gradient_norm_is_logarithmic_only_over_more_than_a_decade(tmp_path: Path) -> None:
    wide = make_run(tmp_path / "w", [{"grad/norm/total": v} for v in (1.0, 20.0, 3.0)])
    narrow = make_run(tmp_path / "n", [{"grad/norm/total": v} for v in (1.0, 5.0, 3.0)])
    scales = []
    for run in (wide, narrow):
        figure = plot_gradient_norm(run.metrics())
        assert figure is not None
        scales.append(figure.axes[0].get_yscale())
    assert scales == ["log", "linear"]


def test_clipped_steps_are_marked_with_the_threshold(run: RunReader) -> None:
    figure = plot_gradient_norm(run.metrics("grad/*"), alerts=[7])
    assert figure is not None
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["clipped at 1 (25.0% of steps)", "alert"]


def test_sampled_layers_leave_no_gaps(run: RunReader) -> None:
    grid = build_layer_grid(run.metrics("optim/*"), "optim/exp_avg_norm")
    assert grid is not None
    assert (grid.first, grid.stride, grid.is_merged) == (6, 5, False)
    assert np.isfinite(grid.cells).all()
    assert grid.cells.shape == (3, 2)


def test_the_layers_of_two_towers_share_a_heat_map(tmp_path: Path) -> None:
    towers = ("vision.blocks", "language.layers")
    norms = {f"grad/norm/layer/{tower}.{i}": 1.0 + i for tower in towers for i in (1, 0)}
    run = make_run(tmp_path / "r", [norms, norms])
    grid = build_layer_grid(run.metrics("grad/norm/layer/*"))
    assert grid is not None
    assert {"vision.blocks.0", "language.layers.1"} < set(grid.layers)
    assert sorted(grid.cells[:, 0]) == [1.0, 1.0, 2.0, 2.0]
    assert plot_layers(run.metrics()) is not None


def test_thinning_keeps_extremes(run: RunReader) -> None:
    frame = run.metrics("train/loss/total")
    series = frame["train/loss/total"]
    few = thin_out(series, limit=4)
    assert len(few) <= 4
    assert {few.max(), few.min()} == {series.max(), series.min()}


def test_svg_ids_carry_the_charts_name(run: RunReader) -> None:
    figure = plot_loss(run.metrics("train/loss/total"))
    assert figure is not None
    svg = to_svg(figure, "loss")
    assert svg.startswith("<svg")
    assert all(i.startswith("loss-") for i in re.findall(r'\bid="([^"]+)"', svg))


def test_lines_and_averages_have_a_hole_at_nan(tmp_path: Path) -> None:
    nan = float("nan")
    losses = [nan if 60 <= step < 70 or step in (80, 82) else step for step in range(1, 101)]
    steps = [{"train/loss/total": loss, "train/step_seconds/total": 1.0} for loss in losses]
    figure = plot_loss(make_run(tmp_path / "r", steps).metrics())
    assert figure is not None
    lone, raw, average = figure.axes[0].get_lines()[:3]
    assert list(lone.get_xdata()) == [81]
    for line in (raw, average):
        values = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        assert np.isnan([values[step] for step in (60, 80, 82)]).all()
        assert values[70] == 70  # the average does not remember what was before the hole

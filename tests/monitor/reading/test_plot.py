"""`run.plot` draws the metrics that match; an error names the pattern that matches none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ulysses_monitor as um
from tests.support.recorded import curve, training, write_run
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import StepRecord


def record(path: Path, *steps: dict[str, float]) -> um.RunReader:
    items = [StepRecord.of(step, float(step), metrics) for step, metrics in enumerate(steps, 1)]
    return write_run(path, items)


def data_of(ax: Axes) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in ax.get_lines()]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


def legend(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def test_layers_are_lines_on_shared_axes_with_a_legend(tmp_path: Path) -> None:
    figure = write_run(tmp_path / "run", training(5)).plot("grad/norm/layer/*")
    (ax,) = figure.axes
    assert titles(figure) == ["grad/norm/layer"]
    assert legend(ax) == ["layer 0", "layer 10"]
    assert data_of(ax) == [[0.5] * 5, [0.25] * 5]
    assert ax.get_xlim() == (0.5, 5.5)


def test_a_single_metric_has_its_name_as_the_title(tmp_path: Path) -> None:
    figure = write_run(tmp_path / "run", training(5)).plot("train/loss/total", steps=(2, 4))
    assert titles(figure) == ["train/loss/total"]
    assert data_of(figure.axes[0]) == [[8.0, 7.0, 6.0]]


def test_each_kind_of_metric_has_its_own_axes_in_the_order_of_the_run(tmp_path: Path) -> None:
    figure = write_run(tmp_path / "run", training(5)).plot("grad/*", "train/loss/total")
    assert titles(figure) == ["train/loss/total", "grad/norm/total", "grad/norm/layer"]
    assert {ax.get_xlim() for ax in figure.axes} == {(0.5, 5.5)}


def test_more_lines_than_a_legend_holds_get_a_colour_bar(tmp_path: Path) -> None:
    layers = {f"grad/norm/layer/{i}": 1.0 + i for i in range(32)}
    figure = record(tmp_path / "run", layers, layers).plot("grad/norm/layer/*")
    (ax,) = figure.axes
    (bar,) = ax.child_axes
    assert not legend(ax)
    assert len(data_of(ax)) == 32
    assert [text.get_text() for text in bar.texts] == ["layer 0", "31"]
    assert len({line.get_color() for line in ax.get_lines()}) == 32


def test_labels_leave_out_what_all_names_share(tmp_path: Path) -> None:
    names = ("model.layers.0.q_proj.weight", "model.layers.1.v_proj.weight")
    run = record(tmp_path / "run", {f"grad/norm/param/{name}": 1.0 for name in names})
    assert legend(run.plot("grad/norm/param/*").axes[0]) == ["0.q_proj", "1.v_proj"]


def test_a_wide_range_of_values_gets_a_logarithmic_scale(tmp_path: Path) -> None:
    wide = write_run(tmp_path / "wide", curve("grad/norm/total", [1.0, 100.0]))
    narrow = write_run(tmp_path / "narrow", curve("grad/norm/total", [1.0, 2.0]))
    scales = [run.plot("grad/*").axes[0].get_yscale() for run in (wide, narrow)]
    assert scales == ["log", "linear"]


@pytest.mark.parametrize("values", [[np.nan] * 3, [1.0, np.inf, 2.0], [0.0] * 3, [-1.0, 1e38, 0]])
def test_any_values_can_be_drawn_and_nonfinite_ones_are_marked(
    tmp_path: Path, values: list[float]
) -> None:
    figure = write_run(tmp_path / "run", curve("train/loss/total", values)).plot("train/*")
    assert legend(figure.axes[0]) == ([] if np.isfinite(values).all() else ["NaN or Inf"])
    figure.savefig(tmp_path / "plot.png")


def test_a_value_that_was_not_recorded_is_not_marked(tmp_path: Path) -> None:
    run = record(tmp_path / "run", {"a/b/c": 1.0}, {"d/e/f": 1.0}, {"a/b/c": 3.0})
    figure = run.plot("*")
    assert [legend(ax) for ax in figure.axes] == [[], []]
    assert data_of(figure.axes[0]) == [[1.0, 3.0]]


def test_text_in_a_name_is_not_a_formula(tmp_path: Path) -> None:
    run = record(tmp_path / "run", {"my/$x^{$/total": 1.0, "my/$x^{$/b": 2.0})
    run.plot("my/*").savefig(tmp_path / "plot.png")


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(2))
    with pytest.raises(InputError) as caught:
        run.plot("train/*", "grad/nrom/layer/*")
    assert str(caught.value) == (
        f"plot: pattern is 'grad/nrom/layer/*'; expected a metric of {run}, or a pattern that "
        "matches one (did you mean 'grad/norm/layer/0'?)"
    )


def test_missing_patterns_and_limits_without_a_step_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(2))
    with pytest.raises(InputError, match="no pattern was given; expected one or more"):
        run.plot()
    with pytest.raises(InputError, match=r"steps is \(8, 9\).* expected limits that include"):
        run.plot("train/*", steps=(8, 9))


def test_a_plot_ignores_and_keeps_the_users_matplotlib_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(3))
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 40}):
        before = dict(mpl.rcParams)
        figure = run.plot("train/*")
        assert dict(mpl.rcParams) == before
    assert figure.axes[0].get_facecolor() == (0.0, 0.0, 0.0, 0.0)


def test_reading_a_run_imports_neither_matplotlib_nor_jinja(tmp_path: Path) -> None:
    write_run(tmp_path / "run", training(2))
    code = (
        "import sys, ulysses_monitor as um; run = um.open_run(sys.argv[1]); run.summary();"
        "sys.exit(bool({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)

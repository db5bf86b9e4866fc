"""Reading only what the page shows changes nothing that it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pandas.testing import assert_frame_equal, assert_series_equal

from tests.monitor.report.recorded import INF, NAN, make_run, step_metrics
from ulysses_monitor.reading import RunReader, chunks
from ulysses_monitor.report import find_largest_gradients, find_most_unbalanced, write_report
from ulysses_monitor.report.band import build_band
from ulysses_monitor.report.layers import build_layer_grid
from ulysses_monitor.report.recorded import read_recorded

BROKEN = 60


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    """A run with NaN and Inf, several rates, evaluations and metrics that end early."""
    steps = []
    for step in range(1, 121):
        metrics = step_metrics(step, layers=4, extra=6)
        metrics["grad/nonfinite/total"] = 3.0 * (step in (BROKEN, 120))
        metrics["grad/nonfinite/layer/1"] = 3.0 * (step in (BROKEN, 120))
        metrics |= {f"optim/lr/{group}": 1e-4 * (group // 2 + 1) for group in range(1, 12)}
        metrics["train/reward/total"] = float(step)
        if step % 30 == 0:
            metrics |= {"eval/loss/total": 1 / step, "eval/accuracy/total": NAN}
        if step > 100:
            del metrics["grad/norm/param/m.extra.3.weight"]
        steps.append(metrics)
    steps[20]["train/loss/total"] = NAN
    steps[70]["grad/norm/layer/2"] = INF
    return make_run(tmp_path_factory.mktemp("runs") / "odd", steps)


def page(run: RunReader, path: Path) -> str:
    html = write_report(run, path).read_text(encoding="utf-8")
    return re.sub(r"Written .* UTC", "", html)


def test_the_page_of_a_run_read_in_small_pieces_is_the_same(
    odd_run: RunReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = page(odd_run, tmp_path / "whole.html")
    monkeypatch.setattr(chunks, "_VALUES", 250)
    assert page(odd_run, tmp_path / "pieces.html") == whole


def test_what_is_kept_is_what_the_whole_frame_gives(
    odd_run: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_VALUES", 250)
    whole, found = odd_run.metrics(), read_recorded(odd_run)
    assert list(found.frame.index) == list(whole.index)
    assert [n for n in found.frame if n.startswith("optim/lr/")] == [
        f"optim/lr/{group}" for group in (0, 2, 4, 6)
    ]
    for metric in ("optim/exp_avg_norm", "optim/exp_avg_sq_mean"):
        expected = build_layer_grid(whole, metric)
        assert expected is not None
        assert found.layers[metric].layers == expected.layers == (0, 1, 2, 3)
        np.testing.assert_array_equal(found.layers[metric].cells, expected.cells)
    norms = found.layers["grad/norm"].cells
    assert {tuple(cell) for cell in np.argwhere(np.isinf(norms))} == {(1, 59), (1, 119), (2, 70)}
    band = build_band([whole[[n for n in whole if n.startswith("lora/grad_ratio_B_A/module/")]]])
    assert band is not None
    assert found.band is not None
    assert_series_equal(found.band.low, band.low)
    assert_series_equal(found.band.high, band.high)
    assert_frame_equal(find_most_unbalanced(found.ratios), find_most_unbalanced(whole))
    healthy = [n for n in whole if n != "grad/norm/total"]  # its last one is hidden as NaN
    largest = find_largest_gradients(found.gradients)
    assert_frame_equal(largest[["norm"]], find_largest_gradients(whole[healthy])[["norm"]])
    assert list(found.evaluations.index) == [30, 60, 90, 120]


def test_reports_and_replays_do_not_import_torch(odd_run: RunReader, tmp_path: Path) -> None:
    for command in (["report", str(odd_run), "--output", "page.html"], ["replay", str(odd_run)]):
        code = (
            "import sys\nfrom ulysses_core.cli import main\n"
            f"sys.argv[1:] = {command!r}\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'transformers', 'tensorboard', 'numba'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)

"""The report: complete and self-contained for every run, and safe with any text a run holds."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import RunReader, open_run
from ulysses_monitor.reading.sources import DirectorySource
from ulysses_monitor.records import Alert, Event, Schema, StepRecord
from ulysses_monitor.report import write_report
from ulysses_monitor.report.figures import thin, to_svg
from ulysses_monitor.report.formatting import change, count, duration, number, share, tick, when
from ulysses_monitor.report.layers import layer_grid, plot_layers
from ulysses_monitor.report.plots import plot_gradient_norm, plot_lora, plot_loss, plot_metric
from ulysses_monitor.report.tables import event_rows, largest_gradients, most_unbalanced
from ulysses_monitor.store import Location, RunDirectory, StoreSink

NAN, INF = float("nan"), float("inf")
EVIL = "<script>alert('$x^{$')</script>"
INFO = {
    "engine": "plain",
    "world_size": 2,
    "config": {"learning_rate": 2e-4, "lora_rank": 8},
    "model": {"class": "TinyLM", "parameters": 1_240_000_000, "trainable_parameters": 5_640_000},
    "versions": {"torch": "2.13.0"},
    "host": "node-1",
    "max_steps": 12,
}


def make_run(
    path: Path,
    steps: Iterable[Mapping[str, float]],
    *,
    events: Iterable[Event] = (),
    info: Mapping[str, Any] = INFO,
    status: str = "finished",
) -> RunReader:
    """A finished run whose step n, from 1, holds the n-th of `steps`."""
    directory = RunDirectory(path)
    directory.start(info)
    sink = StoreSink(directory)
    schemas: dict[tuple[str, ...], Schema] = {}
    for step, metrics in enumerate(steps, start=1):
        schema = schemas.setdefault(tuple(metrics), Schema(tuple(metrics)))
        sink.write(StepRecord(step, 1e9 + step, schema, np.array([*metrics.values()], np.float64)))
    for event in events:
        sink.write(event)
    sink.close()
    directory.finish(status)
    return open_run(path)


def step_metrics(step: int, *, layers: int = 3, extra: int = 0) -> dict[str, float]:
    """A realistic step with adapters on every layer; the optimizer is sampled each 5 steps."""
    sides = [f"m.layers.{i}.q.lora_{s}.default.weight" for i in range(layers) for s in "AB"]
    params = [*sides, *(f"m.extra.{i}.weight" for i in range(extra))]
    scopes = ["total", *(f"layer/{i}" for i in range(layers)), *(f"param/{p}" for p in params)]
    norm = 3.0 / step + 0.1
    metrics = {f"grad/norm/{scope}": norm * (1 + i % 7) for i, scope in enumerate(scopes)}
    ratio = INF if step == 1 else 1 + 40 / step
    metrics |= {
        f"lora/grad_ratio_B_A/module/m.layers.{i}.q": ratio * (1 + i) for i in range(layers)
    }
    if step % 5 == 1 and step > 1:
        metrics |= {f"optim/exp_avg_norm/{scope}": norm / 3 for scope in scopes}
        metrics |= {f"optim/exp_avg_sq_mean/{scope}": norm**2 / 1e6 for scope in scopes}
    return metrics | {
        "lora/grad_ratio_B_A/total": ratio,
        "optim/lr/0": 1e-4,
        "train/loss/total": 1 + 1 / step,
        "grad/clip_coef/total": min(1.0, 1 / norm),
        "train/step_seconds/total": 0.5,
        "train/tokens_per_second/total": 12_345.0,
        "monitor/overhead_seconds/total": 0.004,
    }


def html_of(run: RunReader) -> str:
    html = write_report(run).read_text(encoding="utf-8")
    Strict().feed(html)
    return html


class Strict(HTMLParser):
    """Fails on what a report must not have: scripts, handlers, links out, twin ids, bad nesting."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img", "b"), tag
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/png;base64,"))
            if name == "id":
                assert value not in self.ids
                self.ids.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def headings(html: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", html)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    """Twelve steps with adapters, a held-out loss, an alert, a checkpoint."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    steps = [step_metrics(s) for s in range(1, 13)]
    steps[5]["eval/loss/total"], steps[11]["eval/loss/total"] = 1.9, 1.2
    alert = Alert(
        rule="loss_spike",
        step=7,
        metric="train/loss/total",
        value=9.0,
        threshold=3.0,
        message="Step 7: the loss is 9.",
        hint="Look at the batch.",
    )
    events = [
        Event(kind="start", step=0, time=1e9, data={"engine": "plain", "world_size": 2}),
        alert.to_event(1e9),
        Event(kind="checkpoint", step=6, time=1e9, data={"path": "checkpoint-6"}),
        Event(kind="stop", step=12, time=1e9, data={"status": "finished"}),
    ]
    return make_run(path, steps, events=events)


@pytest.fixture(scope="module")
def html(run: RunReader) -> str:
    return html_of(run)


# -- the page ------------------------------------------------------------------------------------


def test_a_full_run_has_every_section_in_order_and_its_key_figures(html: str) -> None:
    assert headings(html) == [
        "Alerts",
        "Loss",
        "Gradient norms",
        "LoRA",
        "Optimizer state",
        "Speed and cost",
        "Largest gradients at the end",
        "Run",
    ]
    for text in ("1.24B", "5.64M", "0.45 % of them", "2 processes", "12.3k", "1.900 → 1.200"):
        assert text in html, text
    for text in ("∞ → 4.33", "0.80 %", "1 warning", "loss_spike", "Look at the batch.", "of 12"):
        assert text in html, text
    assert html.count("<svg") == 11


def test_the_page_asks_for_nothing_from_outside(html: str) -> None:
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"]*", "", html))


def test_every_chart_says_in_words_what_it_shows(html: str) -> None:
    alts = re.findall(r'role="img" aria-label="([^"]+)"', html)
    assert len(alts) == html.count("<svg")
    assert alts[0].startswith("Training loss over step, from 2.00 to 1.08")


def test_charts_take_their_colours_from_the_theme(html: str) -> None:
    assert "stroke: var(--blue, #2760c4)" in html
    assert "prefers-color-scheme: dark" in html


def test_infinite_ratio_of_the_first_step_is_said_and_not_drawn(html: str) -> None:
    assert "∞ at step 1" in html


def test_text_from_the_run_is_shown_and_never_run(tmp_path: Path) -> None:
    metrics = step_metrics(3) | {
        f"grad/norm/param/{EVIL}": 99.0,
        f"lora/grad_ratio_B_A/module/{EVIL}": 1e9,
        "optim/lr/$a$<b>": 3e-4,
        "grad/norm/layer/<b>": 1.0,
    }
    info = {
        **INFO,
        "engine": EVIL,
        "config": {EVIL: EVIL, "half": "\ud800"},
        "model": {"class": EVIL},
        "versions": {EVIL: EVIL},
        "trainer": EVIL,
        "host": EVIL,
    }
    alert = Alert(
        rule=EVIL, step=1, metric="a/b/c", value=NAN, threshold=INF, message=EVIL, hint=EVIL
    )
    events = [alert.to_event(1e9), Event(kind=EVIL, step=1, time=1e9, data={EVIL: EVIL})]
    run = make_run(tmp_path / "a<b>$", [metrics] * 3, info=info, events=events)
    html = html_of(run)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10
    assert "$a$&lt;b&gt;" in html  # in a chart's legend: text, and no formula


def test_the_report_is_replaced_only_when_complete(run: RunReader, tmp_path: Path) -> None:
    path = tmp_path / "own.html"
    assert write_report(run, path) == path
    before = path.read_text()
    broken = RunReader(DirectorySource(Location.of(tmp_path / "nowhere")), tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        write_report(broken, path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["own.html"]


def test_a_directory_as_path_is_an_input_error(run: RunReader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a file"):
        write_report(run, tmp_path)


def test_the_users_matplotlib_settings_are_neither_used_nor_changed(run: RunReader) -> None:
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 40}):
        before = dict(mpl.rcParams)
        write_report(run)
        assert dict(mpl.rcParams) == before


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, ulysses_monitor; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- partial runs --------------------------------------------------------------------------------


def test_a_run_with_no_metrics_has_a_page_with_dashes(tmp_path: Path) -> None:
    html = html_of(make_run(tmp_path / "r", [], info={}, status="failed"))
    assert headings(html) == ["Alerts", "Run"]
    assert "No rule fired." in html
    assert html.count("<dd>—</dd>") >= 8
    assert 'class="status failed"' in html


def test_a_run_with_one_step_is_drawn(tmp_path: Path) -> None:
    html = html_of(make_run(tmp_path / "r", [step_metrics(1)]))
    assert {"Loss", "Gradient norms", "LoRA", "Speed and cost"} <= set(headings(html))


def test_a_live_run_is_reported_as_running(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "live")
    directory.start(INFO)
    sink = StoreSink(directory)
    for step in (1, 2, 3):
        sink.write(StepRecord.of(step, 1e9 + step, step_metrics(step)))
    sink.flush()
    html = html_of(open_run(tmp_path / "live"))
    assert 'class="status running"' in html
    sink.close()
    directory.release()
    assert 'class="status crashed"' in html_of(open_run(tmp_path / "live"))


def test_a_run_with_no_adapters_has_no_lora_heading(tmp_path: Path) -> None:
    steps = [
        {k: v for k, v in step_metrics(s).items() if not k.startswith("lora/")} for s in range(1, 5)
    ]
    html = html_of(make_run(tmp_path / "r", steps))
    assert "LoRA" not in headings(html)
    assert ">LoRA B/A</dt><dd>—" in html


def test_a_run_with_no_layers_has_no_layer_picture(tmp_path: Path) -> None:
    steps = [{"grad/norm/total": 1.0 + s, "train/loss/total": 2.0} for s in range(5)]
    html = html_of(make_run(tmp_path / "r", steps))
    assert "Picture of layers" not in html
    assert "Gradient norms" in headings(html)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0, -1.0, 1e38, 1e-38])
def test_any_constant_value_of_all_metrics_can_be_drawn(tmp_path: Path, bad: float) -> None:
    steps = [dict.fromkeys([*step_metrics(6), "eval/loss/total"], bad)] * 30
    html_of(make_run(tmp_path / "r", steps))


def test_steps_with_no_finite_loss_are_marked_and_counted(tmp_path: Path) -> None:
    steps = [step_metrics(s) for s in range(1, 31)]
    for i in (10, 11, 20):
        steps[i]["train/loss/total"] = NAN if i < 20 else INF
        steps[i]["grad/norm/total"] = INF
    html = html_of(make_run(tmp_path / "r", steps))
    assert "not finite at 3 steps" in html
    assert html.count(">not finite<") == 2


def test_a_large_run_gives_a_small_file_in_little_time(tmp_path: Path) -> None:
    steps = (step_metrics(s, layers=32, extra=340) for s in range(1, 1001))
    run = make_run(tmp_path / "r", steps)
    began = time.process_time()  # others may use the processor, too
    path = write_report(run)
    assert time.process_time() - began < 6
    assert path.stat().st_size < 2_000_000


def test_a_long_run_keeps_its_spike_and_a_small_file(tmp_path: Path) -> None:
    def metrics(step: int) -> dict[str, float]:
        noise = abs(math.sin(step * 12.9898) * 43758.5453) % 1
        spike = 500.0 if step == 7_777 else 1.0
        layers = {f"grad/norm/layer/{i}": spike + noise for i in (2, 10, 1)}
        return {"train/loss/total": 1 + noise, "grad/norm/total": spike + noise, **layers}

    run = make_run(tmp_path / "r", (metrics(s) for s in range(1, 20_001)))
    grid = layer_grid(run.metrics("grad/norm/layer/*"))
    assert grid is not None
    assert grid.layers == (1, 2, 10)
    assert grid.cells.shape[1] <= 640
    column = (7_777 - grid.first) // grid.stride
    assert (grid.cells[:, column] > 499).all()
    assert (np.delete(grid.cells, column, axis=1) < 3).all()
    html = html_of(run)
    assert "Each column shows the largest of its steps." in html
    assert len(html) < 1_000_000


# -- charts and tables ---------------------------------------------------------------------------


def test_charts_return_none_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    frame = make_run(tmp_path / "r", [{"a/b/c": 1.0}]).metrics()
    assert plot_loss(frame) is None
    assert plot_gradient_norm(frame) is None
    assert plot_lora(frame) is None
    assert plot_layers(frame) is None
    assert plot_metric(frame, "train/loss/total", "Loss") is None


def test_gradient_norm_is_logarithmic_only_over_more_than_a_decade(tmp_path: Path) -> None:
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
    assert labels == ["clipped at 1: 25.0 % of steps", "alert"]


def test_sampled_layers_leave_no_gaps(run: RunReader) -> None:
    grid = layer_grid(run.metrics("optim/*"), "optim/exp_avg_norm")
    assert grid is not None
    assert (grid.first, grid.stride, grid.merged) == (6, 5, False)
    assert np.isfinite(grid.cells).all()
    assert grid.cells.shape == (3, 2)


def test_largest_gradients_are_a_mean_and_a_share_of_squares(tmp_path: Path) -> None:
    steps = [
        {"grad/norm/total": 5.0, "grad/norm/param/a": 3.0, "grad/norm/param/b": 4.0}
        for _ in range(15)
    ]
    steps[0]["grad/norm/param/a"] = 1e6  # long past: not of the last 10 steps
    table = largest_gradients(make_run(tmp_path / "r", steps).metrics(), most=1)
    assert table.to_dict("index") == {"b": pytest.approx({"norm": 4.0, "share": 0.64})}


def test_most_unbalanced_looks_at_both_directions_and_at_infinity(tmp_path: Path) -> None:
    values = {"x": 2.0, "low": 0.01, "high": 50.0, "inf": INF, "nan": NAN}
    steps = [{f"lora/grad_ratio_B_A/module/{k}": v for k, v in values.items()}] * 3
    table = most_unbalanced(make_run(tmp_path / "r", steps).metrics(), most=3)
    assert table.index.tolist() == ["inf", "low", "high"]


def test_evaluations_that_left_no_event_are_listed_between_start_and_stop(run: RunReader) -> None:
    rows = event_rows(run, run.metrics("eval/*"))
    assert [(row["step"], row["kind"]) for row in rows] == [
        (0, "start"),
        (6, "eval"),
        (6, "checkpoint"),
        (12, "eval"),
        (12, "stop"),
    ]
    assert rows[0]["what"] == "engine plain, world_size 2"
    assert rows[1]["what"] == "loss 1.900"


def test_thinning_keeps_extremes(run: RunReader) -> None:
    frame = run.metrics("train/loss/total")
    series = frame["train/loss/total"]
    few = thin(series, most=4)
    assert len(few) <= 4
    assert {few.max(), few.min()} == {series.max(), series.min()}


def test_svg_ids_carry_the_charts_name(run: RunReader) -> None:
    figure = plot_loss(run.metrics("train/loss/total"))
    assert figure is not None
    svg = to_svg(figure, "loss")
    assert svg.startswith("<svg")
    assert all(i.startswith("loss-") for i in re.findall(r'\bid="([^"]+)"', svg))


# -- numbers for people --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.96, "1.00k"),
        (123.4, "123"),
        (1e9, "1.00B"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (-INF, "\N{MINUS SIGN}∞"),
        (NAN, "—"),
        (None, "—"),
        ("inf", "∞"),
        ("text", "—"),
        (0.0009996, "0.00100"),
        (0.00012, "1.20e-4"),
        (3e20, "3.00e20"),
    ],
)
def test_numbers_read_well(value: object, text: str) -> None:
    assert number(value) == text


def test_other_formats_read_well() -> None:
    assert [tick(v) for v in (10, 100, 1, 0.5, 2e-5, 12_000, 1.05)] == [
        *("10", "100", "1", "0.5", "2e-5", "12k", "1.05")
    ]
    assert [share(v) for v in (0.0083, 0.331, 1e-6, 0, 1, None)] == [
        *("0.83 %", "33.1 %", "< 0.01 %", "0 %", "100 %", "—")
    ]
    assert [duration(v) for v in (0.5, 59.4, 3_900, 200_000, NAN)] == [
        *("0.5 s", "59.4 s", "1 h 5 min", "2 d 7 h", "—")
    ]
    assert (count(12_000), count(INF), change(None, None), change(INF, 2)) == (
        *("12,000", "—", "—", "∞ → 2.00"),
    )
    assert when("never") == when(NAN) == when(1e300) == "—"

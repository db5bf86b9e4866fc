"""The page is complete and self-contained for every run, and safe with any text in a run."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from tests.monitor.report.recorded import INF, INFO, NAN, make_run, step_metrics
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import RunReader, open_run
from ulysses_monitor.reading.sources import DirectorySource
from ulysses_monitor.records import Alert, Event, StepRecord
from ulysses_monitor.report import write_report
from ulysses_monitor.report.layers import build_layer_grid
from ulysses_monitor.store import Location, RunDirectory, StoreSink

EVIL = "<script>alert('$x^{$')</script>"


def html_of(run: RunReader) -> str:
    html = write_report(run).read_text(encoding="utf-8")
    Strict().feed(html)
    return html


class Strict(HTMLParser):
    """Rejects scripts, event handlers, external links, duplicate ids and bad nesting."""

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
def html(run: RunReader) -> str:
    return html_of(run)


# -- the page ------------------------------------------------------------------------------------


def test_the_report_of_a_full_run_has_every_section_in_order_and_its_key_figures(html: str) -> None:
    assert headings(html) == [
        "Alerts",
        "Loss",
        "Gradient norms",
        "LoRA",
        "Optimizer state",
        "Speed and overhead",
        "Largest gradients",
        "Run",
    ]
    for text in ("1.24B", "5.64M", "0.45% of all", "2 processes", "12.3k", "1.900 → 1.200"):
        assert text in html, text
    for text in ("∞ → 4.33", "0.80%", "1 warning", "loss_spike", "Look at the batch.", "of 12"):
        assert text in html, text
    assert html.count("<svg") == 11


def test_the_page_requests_nothing_from_outside(html: str) -> None:
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"]*", "", html))


def test_every_chart_has_a_description_in_words(html: str) -> None:
    alts = re.findall(r'role="img" aria-label="([^"]+)"', html)
    assert len(alts) == html.count("<svg")
    assert alts[0].startswith("Training loss by step, from 2.00 to 1.08")


def test_charts_take_their_colours_from_the_theme(html: str) -> None:
    assert "stroke: var(--blue, #2760c4)" in html
    assert "prefers-color-scheme: dark" in html


def test_the_infinite_ratio_of_the_first_step_is_noted_and_not_drawn(html: str) -> None:
    assert "∞ at step 1" in html


def test_text_from_the_run_is_shown_and_never_executed(tmp_path: Path) -> None:
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
    assert "$a$&lt;b&gt;" in html  # in a chart's legend, as text and not as a formula


def test_the_report_is_replaced_only_when_complete(run: RunReader, tmp_path: Path) -> None:
    path = tmp_path / "own.html"
    assert write_report(run, path) == path
    before = path.read_text()
    broken = RunReader(DirectorySource(Location.of(tmp_path / "nowhere")), tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        write_report(broken, path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["own.html"]


def test_a_directory_as_the_path_is_an_input_error(run: RunReader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory; expected a file"):
        write_report(run, tmp_path)


def test_the_report_ignores_and_keeps_the_users_matplotlib_settings(run: RunReader) -> None:
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 40}):
        before = dict(mpl.rcParams)
        write_report(run)
        assert dict(mpl.rcParams) == before


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, ulysses_monitor; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- partial runs --------------------------------------------------------------------------------


def test_the_page_of_a_run_with_no_metrics_has_dashes(tmp_path: Path) -> None:
    html = html_of(make_run(tmp_path / "r", [], info={}, status="failed"))
    assert headings(html) == ["Alerts", "Run"]
    assert "No rule fired." in html
    assert html.count("<dd>—</dd>") >= 8
    assert 'class="status failed"' in html


def test_a_run_with_one_step_is_drawn(tmp_path: Path) -> None:
    html = html_of(make_run(tmp_path / "r", [step_metrics(1)]))
    assert {"Loss", "Gradient norms", "LoRA", "Speed and overhead"} <= set(headings(html))


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
    assert ">LoRA gradient ratio B/A</dt><dd>—" in html


def test_a_run_with_no_layers_has_no_heat_map(tmp_path: Path) -> None:
    steps = [{"grad/norm/total": 1.0 + s, "train/loss/total": 2.0} for s in range(5)]
    html = html_of(make_run(tmp_path / "r", steps))
    assert "Heat map of layers" not in html
    assert "Gradient norms" in headings(html)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0, -1.0, 1e38, 1e-38])
def test_any_constant_value_of_every_metric_can_be_drawn(tmp_path: Path, bad: float) -> None:
    steps = [dict.fromkeys([*step_metrics(6), "eval/loss/total"], bad)] * 30
    html_of(make_run(tmp_path / "r", steps))


def test_steps_with_a_nonfinite_loss_are_marked_and_counted(tmp_path: Path) -> None:
    steps = [step_metrics(s) for s in range(1, 31)]
    for i in (10, 11, 20):
        steps[i]["train/loss/total"] = NAN if i < 20 else INF
        steps[i]["grad/norm/total"] = INF
    html = html_of(make_run(tmp_path / "r", steps))
    assert "NaN or Inf at 3 steps" in html
    assert html.count(">NaN or Inf<") == 2


def broken_step(step: int) -> dict[str, float]:
    """Returns a step whose gradient is NaN everywhere: the recorded norm of the rest is 0."""
    metrics = step_metrics(step) | {"train/loss/total": NAN}
    norms = [name for name in metrics if name.startswith("grad/norm/")]
    counts = {name.replace("/norm/", "/nonfinite/"): 7.0 for name in norms}
    return metrics | dict.fromkeys(norms, 0.0) | counts


def test_a_run_that_ends_in_nan_never_looks_calm(tmp_path: Path) -> None:
    steps = [broken_step(s) if s in (12, 13) or s > 28 else step_metrics(s) for s in range(1, 31)]
    run = make_run(tmp_path / "r", steps)
    html = html_of(run)
    assert '<span class="status failed">finished with NaN or Inf</span>' in html
    for figure in ("Training loss", "Gradient norm"):
        found = re.search(rf"<dt>{figure}</dt><dd>(.*?)</dd><dd class=.note.>(.*?)<", html)
        assert found is not None
        assert found[1].endswith("→ NaN")
        assert found[2] == "NaN or Inf at 4 steps"
    assert html.count(">NaN or Inf<") >= 4  # loss, norm, layers, and the largest gradients
    summary = run.summary()
    assert math.isnan(summary["loss_last"])
    assert math.isnan(summary["grad_norm_last"])
    assert math.isfinite(summary["loss_first"])


def test_damaged_files_are_named_above_everything_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [step_metrics(1)])
    part = next(file for file in (tmp_path / "r/metrics").iterdir() if file.is_file())
    (tmp_path / "r/metrics" / part.name).write_bytes(b"nothing")
    (tmp_path / "r/events.jsonl").write_text('{"kind": "sta\n{"kind": "alert", "step": 1}\n')
    head = html_of(run).partition("<dl")[0]
    assert f"<code>metrics/{part.name}</code> is damaged" in head
    assert "<code>events.jsonl</code> is damaged" in head
    assert "lines that hold no event: 1" in head
    assert "Damaged files" not in html_of(make_run(tmp_path / "sound", [step_metrics(1)]))


def test_a_large_run_gets_a_small_file_quickly(tmp_path: Path) -> None:
    steps = (step_metrics(s, layers=32, extra=340) for s in range(1, 1001))
    run = make_run(tmp_path / "r", steps)
    began = time.process_time()  # other processes may use the processor too
    path = write_report(run)
    assert time.process_time() - began < 6
    assert path.stat().st_size < 2_000_000


def test_a_long_run_keeps_its_spike_in_a_small_file(tmp_path: Path) -> None:
    def metrics(step: int) -> dict[str, float]:
        noise = abs(math.sin(step * 12.9898) * 43758.5453) % 1
        spike = 500.0 if step == 7_777 else 1.0
        layers = {f"grad/norm/layer/{i}": spike + noise for i in (2, 10, 1)}
        return {"train/loss/total": 1 + noise, "grad/norm/total": spike + noise, **layers}

    run = make_run(tmp_path / "r", (metrics(s) for s in range(1, 20_001)))
    grid = build_layer_grid(run.metrics("grad/norm/layer/*"))
    assert grid is not None
    assert grid.layers == (1, 2, 10)
    assert grid.cells.shape[1] <= 640
    column = (7_777 - grid.first) // grid.stride
    assert (grid.cells[:, column] > 499).all()
    assert (np.delete(grid.cells, column, axis=1) < 3).all()
    html = html_of(run)
    assert "Each column shows the maximum over its steps." in html
    assert len(html) < 1_000_000


def test_what_the_trainer_and_the_user_log_has_charts(tmp_path: Path) -> None:
    steps = [step_metrics(s) for s in range(1, 4)]
    for metrics in steps:
        metrics |= {"train/rewards/chosen/total": 0.5, "my/met[r]ic/total": 1.0}
    html = html_of(make_run(tmp_path / "run", steps))
    section = html.split('<h2 id="logged">')[1].split("</section>")[0]
    assert section.count("<svg") == 2
    assert "rewards/chosen, from 0.500 to 0.500" in section
    assert "my/met[r]ic, from 1.00 to 1.00" in section


def test_a_run_that_failed_says_why_at_the_top(tmp_path: Path) -> None:
    data = {"status": "failed", "error": f"ValueError: {EVIL}", "log": ["WARNING mine: one", EVIL]}
    stop = Event(kind="stop", step=1, time=1.0, data=data)
    html = html_of(make_run(tmp_path / "run", [step_metrics(1)], events=[stop], status="failed"))
    top, _, rest = html.partition('<dl class="facts">')
    assert "Failed after step 1: <code>ValueError: &lt;script&gt;" in top
    assert "WARNING mine: one\n&lt;script&gt;" in top
    assert rest
    finished = html_of(make_run(tmp_path / "fine", [step_metrics(1)], events=[stop]))
    assert "Failed after" not in finished


def test_memory_has_charts_where_it_was_recorded(tmp_path: Path) -> None:
    host, device = "system/host_memory_bytes/total", "system/device_memory_peak_bytes/total"
    steps = [step_metrics(step) | {host: step * 2.0**30} for step in (1, 2, 3)]
    html = html_of(make_run(tmp_path / "cpu", steps))
    assert "Host memory, GiB, largest over ranks, from 1.00 to 3.00" in html
    assert "Peak device memory" not in html
    html = html_of(make_run(tmp_path / "gpu", [step | {device: 2.0**31} for step in steps]))
    assert "Peak device memory, GiB, largest over ranks, from 2.00 to 2.00" in html

from __future__ import annotations

import logging
import math
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServersAccumulator,
)
from tensorboard.compat.proto.event_pb2 import Event as EventProto
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Alert, Event, Schema, StepRecord
from ulysses_monitor.sinks import TensorBoardSink


def read_back(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    events = read_back(folder)
    if tag not in events.Tags()["tensors"]:
        return []
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]


def start(step: int) -> Event:
    data = {"engine": "plain", "world_size": 1, "max_steps": 10}
    return Event(kind="start", step=step, time=50.0 + step, data=data)


def events_of(folder: Path) -> list[EventProto]:
    """Reads every event of the file in a folder, from its framing alone."""
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(EventProto.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_totals_and_layers_are_written_and_parameters_are_not(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2):
        values = {
            "train/loss/total": 3.0 / step,
            "grad/norm/layer/0": 0.5 * step,
            "grad/norm/param/layers.0.weight": 1.0,
            "lora/grad_ratio_B_A/module/layers.0.q": 2.0,
            "lora/grad_ratio_B_A/total": 2.0,
            "optim/lr/0": 1e-4,
        }
        sink.write(StepRecord.of(step, 100.0 + step, values))
    sink.flush()
    sink.close()
    events = read_back(tmp_path)
    tags = set(events.Tags()["scalars"])
    assert tags == {
        "train/loss/total",
        "grad/norm/layer/0",
        "lora/grad_ratio_B_A/total",
        "optim/lr/0",
    }
    loss = events.Scalars("train/loss/total")
    assert [(e.step, e.value, e.wall_time) for e in loss] == [(1, 3.0, 101.0), (2, 1.5, 102.0)]


def test_a_step_is_one_event_however_many_metrics_it_has(tmp_path: Path) -> None:
    schema = Schema(tuple(f"optim/lr/{i}" for i in range(200)))
    sink = TensorBoardSink(tmp_path, picture_every=0)
    for step in (1, 2, 3):
        sink.write(StepRecord(step, 0.0, schema, np.arange(200.0)))
    sink.close()
    written = [e for e in events_of(tmp_path) if len(e.summary.value) > 1]
    assert [(e.step, len(e.summary.value)) for e in written] == [(1, 200), (2, 200), (3, 200)]


def test_ten_thousand_parameters_make_few_tags_and_a_text_says_where_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"grad/norm/param/layers.{i}.weight" for i in range(10_000)]
    values = dict.fromkeys(["grad/norm/total", "grad/norm/layer/0", *names], 1.0)
    sink = TensorBoardSink(tmp_path)
    with caplog.at_level(logging.INFO, "ulysses_monitor"):
        for step in (1, 2):
            sink.write(StepRecord.of(step, 0.0, values))
    sink.close()
    assert len(read_back(tmp_path).Tags()["scalars"]) == 2
    words = "10,000 metrics of single parameters and modules are only in the run store"
    assert [(step, words in text) for step, text in texts(tmp_path, "about")] == [(1, True)]
    assert caplog.text.count(words) == 1


def test_requested_parameters_get_tags(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, parameters=["grad/norm/param/*embed*", "lora/*/module/*"])
    values = {
        "grad/norm/param/embed_tokens.weight": 1.0,
        "grad/norm/param/layers.0.weight": 1.0,
        "lora/stable_rank/module/layers.0.q": 1.0,
        "train/loss/total": 1.0,
    }
    sink.write(StepRecord.of(1, 0.0, values))
    sink.close()
    assert set(read_back(tmp_path).Tags()["scalars"]) == {
        "grad/norm/param/embed_tokens.weight",
        "lora/stable_rank/module/layers.0.q",
        "train/loss/total",
    }


@pytest.mark.parametrize(
    "options", [{"parameters": "grad/*"}, {"histograms": "grad/*"}, {"picture_every": -1}]
)
def test_wrong_options_are_refused_by_name(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"sink tensorboard: {next(iter(options))}"):
        TensorBoardSink(tmp_path, **options)  # type: ignore[arg-type]


def test_percentiles_over_modules_are_numpys_and_unknown_ones_are_left_out(tmp_path: Path) -> None:
    values = np.random.default_rng(0).lognormal(size=40)
    values[7] = math.nan
    names = tuple(f"lora/grad_ratio_B_A/module/layers.{i}.q" for i in range(40))
    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecord(1, 0.0, Schema(names), values))
    sink.close()
    events = read_back(tmp_path)
    expected = np.percentile(np.delete(values, 7), (10, 50, 90))
    for p, value in zip((10, 50, 90), expected, strict=True):
        (event,) = events.Scalars(f"lora/grad_ratio_B_A/p{p}")
        assert event.value == pytest.approx(value, rel=1e-6)


def test_nonfinite_values_are_left_out_and_the_others_stay(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, value in enumerate([1.0, math.nan, math.inf, 4.0, 1e300], 1):
        sink.write(StepRecord.of(step, 0.0, {"train/loss/total": value, "optim/lr/0": 1.0}))
    sink.close()
    events = read_back(tmp_path)
    assert [e.step for e in events.Scalars("train/loss/total")] == [1, 4]
    assert [e.step for e in events.Scalars("optim/lr/0")] == [1, 2, 3, 4, 5]


def test_a_norm_that_left_out_nan_leaves_no_point(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, count in ((1, 0.0), (2, 5.0)):
        norms = {"grad/norm/total": 0.25, "grad/norm/layer/0": 0.25}
        counts = {"grad/nonfinite/total": count, "grad/nonfinite/layer/0": count}
        sink.write(StepRecord.of(step, 0.0, norms | counts))
    sink.close()
    for name in ("grad/norm/total", "grad/norm/layer/0"):
        assert [point.step for point in read_back(tmp_path).Scalars(name)] == [1]
    ((step, text),) = texts(tmp_path, "not finite")
    assert step == 2
    assert "`grad/norm/total` = nan" in text


def test_a_text_says_when_values_stop_being_finite_and_when_they_recover(
    tmp_path: Path,
) -> None:
    schema = Schema(("train/loss/total", "grad/norm/total"))
    sink = TensorBoardSink(tmp_path)
    for step, loss in enumerate([1.0, math.nan, math.nan, 2.0], 1):
        sink.write(StepRecord(step, 0.0, schema, np.array([loss, 1.0])))
    sink.close()
    first, second = texts(tmp_path, "not finite")
    assert first[0] == 2
    assert "1 of 2 values are not finite" in first[1]
    assert "`train/loss/total` = nan" in first[1]
    assert second == (4, "step 4: all values are finite again")


def test_an_alert_is_written_as_text_at_its_step_under_its_rule(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for rule in ("spike", "no/such rule"):
        alert = Alert(
            rule=rule, step=7, metric="a/a/a", value=1.0, threshold=0.0, message="It broke."
        )
        sink.write(alert.to_event(0.0))
    sink.close()
    assert texts(tmp_path, "alerts/spike") == [(7, "**warning**: It broke.")]
    assert texts(tmp_path, "alerts/no_such_rule") == [(7, "**warning**: It broke.")]


def test_text_from_a_run_is_not_markup(tmp_path: Path) -> None:
    alert = Alert(
        rule="r",
        step=1,
        metric="a/a/a",
        value=1.0,
        threshold=0.0,
        message="<script>\n[x](http://y) *b*",
    )
    sink = TensorBoardSink(tmp_path)
    sink.write(alert.to_event(0.0))
    sink.close()
    ((_, text),) = texts(tmp_path, "alerts/r")
    assert text == r"**warning**: \<script\> \[x\]\(http://y\) \*b\*"


def test_the_projects_layout_is_in_the_event_file(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(start(0))
    sink.close()
    (event,) = read_back(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {c.title: c for category in layout.category for c in category.chart}
    lines = {tag for chart in charts.values() for tag in chart.multiline.tag}
    assert "^sp/all_to_all_seconds/total$" in lines
    assert "^optim/update_ratio/layer/.*$" in lines
    assert "^grad/clip_coef/total$" in lines
    (band,) = charts["B/A gradient ratio"].margin.series
    assert band.value == "lora/grad_ratio_B_A/p50"
    assert band.upper == "lora/grad_ratio_B_A/p90"


@pytest.mark.parametrize("name", ["grad/norm/param/a/b", "lora/x/module/m"])
def test_a_record_with_only_hidden_metrics_writes_no_scalar(tmp_path: Path, name: str) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecord.of(1, 0.0, {name: 1.0}))
    sink.close()
    assert read_back(tmp_path).Tags()["scalars"] == []


def test_requested_histograms_hold_the_values_of_the_step(tmp_path: Path) -> None:
    values = np.random.default_rng(0).lognormal(size=300)
    values[5] = math.nan
    schema = Schema(tuple(f"grad/norm/param/layers.{i}.weight" for i in range(300)))
    sink = TensorBoardSink(tmp_path, histograms=True)
    for step in range(1, 13):
        sink.write(StepRecord(step, 0.0, schema, values))
    sink.close()
    found = read_back(tmp_path).Histograms("grad/norm/param")
    assert [e.step for e in found] == [1, 11]
    histogram = found[0].histogram_value
    finite = values[np.isfinite(values)]
    assert histogram.num == sum(histogram.bucket) == 299
    assert (histogram.min, histogram.max) == (finite.min(), finite.max())
    assert histogram.bucket_limit[0] == finite.min()
    assert histogram.bucket_limit[-1] == finite.max()


@pytest.mark.parametrize("steps", [3, 900])
def test_a_picture_of_layers_by_steps_is_drawn_regularly_and_at_the_end(
    tmp_path: Path, steps: int
) -> None:
    schema = Schema(tuple(f"grad/norm/layer/{i}" for i in range(12)))
    rng = np.random.default_rng(0)
    sink = TensorBoardSink(tmp_path, picture_every=400)
    for step in range(1, steps + 1):
        sink.write(StepRecord(step, 60.0 * step, schema, rng.lognormal(size=12)))
    sink.close()
    images = read_back(tmp_path).Images("grad/norm/layers")
    assert [image.step for image in images] == ([400, 800, 900] if steps == 900 else [3])
    for image in images:
        assert image.encoded_image_string.startswith(b"\x89PNG")
        size = struct.unpack(">II", image.encoded_image_string[16:24])
        assert size == (image.width, image.height)
        assert 600 <= image.width <= 1000
        assert 250 <= image.height <= 900
        assert len(image.encoded_image_string) < 150_000


def test_the_layers_of_an_encoder_and_a_decoder_share_a_picture(tmp_path: Path) -> None:
    layers = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1, 2)]
    sink = TensorBoardSink(tmp_path, picture_every=1)
    for step in (1, 2):
        metrics = {f"grad/norm/layer/{layer}": float(step) for layer in layers}
        sink.write(StepRecord.of(step, 60.0 * step, metrics))
    sink.close()
    events = read_back(tmp_path)
    assert [image.step for image in events.Images("grad/norm/layers")] == [1, 2]
    assert [s.value for s in events.Scalars("grad/norm/layer/decoder.block.2")] == [1.0, 2.0]


def test_short_steps_do_not_draw_a_picture_every_few_seconds(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, picture_every=10)
    for step in range(1, 101):
        sink.write(StepRecord.of(step, 0.5 * step, {"grad/norm/layer/0": 1.0}))
    sink.close()
    steps = [image.step for image in read_back(tmp_path).Images("grad/norm/layers")]
    assert steps == [10, 70, 100]


def test_no_picture_is_drawn_if_switched_off_or_without_layers(tmp_path: Path) -> None:
    for folder, every, name in (("a", 0, "grad/norm/layer/0"), ("b", 1, "grad/norm/total")):
        sink = TensorBoardSink(tmp_path / folder, picture_every=every)
        sink.write(StepRecord.of(1, 0.0, {name: 1.0}))
        sink.close()
        assert read_back(tmp_path / folder).Tags()["images"] == []


@pytest.mark.parametrize("accumulator", [EventAccumulator, ServersAccumulator])
def test_a_resumed_training_replaces_the_steps_it_trains_again(
    tmp_path: Path, accumulator: type
) -> None:
    for first, last, loss in ((1, 10, 1.0), (6, 8, 2.0)):
        sink = TensorBoardSink(tmp_path)
        sink.write(start(first - 1))
        for step in range(first, last + 1):
            sink.write(StepRecord.of(step, 0.0, {"train/loss/total": loss}))
        sink.close()
    events = accumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    if "train/loss/total" in tags.get("scalars", ()):
        found = [e.step for e in events.Scalars("train/loss/total")]
    else:
        found = [e.step for e in events.Tensors("train/loss/total")]
    assert found == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "custom_scalars__config__" in tags["tensors"]


def test_steps_trained_again_within_one_file_are_replaced_too(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3, 4, 2, 3):
        sink.write(StepRecord.of(step, 0.0, {"train/loss/total": 1.0}))
    sink.close()
    assert [e.step for e in read_back(tmp_path).Scalars("train/loss/total")] == [1, 2, 3]


def test_written_events_are_readable_immediately_and_no_thread_is_started(tmp_path: Path) -> None:
    threads = threading.active_count()
    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecord.of(1, 0.0, {"train/loss/total": 1.0}))
    assert [e.step for e in read_back(tmp_path).Scalars("train/loss/total")] == [1]
    assert threading.active_count() == threads
    sink.close()


class FullDisk:
    """A file that, once full, takes only the first bytes of a write, as a full disk does."""

    def __init__(self, file: object) -> None:
        self.file, self.is_full = file, False

    def write(self, data: bytes) -> int:
        return self.file.write(data[:20] if self.is_full else data)  # type: ignore[attr-defined,no-any-return]

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_after_a_full_disk_the_file_is_intact_and_the_item_can_be_written_again(
    tmp_path: Path,
) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(start(0))
    assert sink._file is not None
    disk = FullDisk(sink._file._file)
    sink._file._file = disk  # type: ignore[assignment]
    for step, loss in enumerate([1.0, 1.0, math.nan, 1.0], 1):
        record = StepRecord.of(step, 0.0, {"train/loss/total": loss, "grad/norm/param/a": 1.0})
        disk.is_full = True
        for _ in range(2):
            with pytest.raises(OSError, match="no space left"):
                sink.write(record)
        disk.is_full = False
        sink.write(record)
    sink.close()
    assert [e.step for e in read_back(tmp_path).Scalars("train/loss/total")] == [1, 2, 4]
    assert [step for step, _ in texts(tmp_path, "not finite")] == [3, 4]
    assert [step for step, _ in texts(tmp_path, "about")] == [1]


def test_the_constructor_opens_nothing_because_it_runs_on_every_rank(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "events")
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_the_event_file_goes_to_the_run_directory_by_default(tmp_path: Path) -> None:
    sink = TensorBoardSink()
    with pytest.raises(InputError, match="there is no run directory; expected a directory"):
        sink.write(start(0))
    for run in ("a", "b"):  # a monitor can start again
        sink.open(tmp_path / run, {})
        sink.write(StepRecord.of(1, 0.0, {"train/loss/total": 1.0}))
        sink.close()
        assert read_back(tmp_path / run / "tensorboard").Tags()["scalars"] == ["train/loss/total"]

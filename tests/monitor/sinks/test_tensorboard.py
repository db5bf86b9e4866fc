from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.sinks import TensorBoardSink


def read_back(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


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


def test_values_that_are_not_finite_are_left_out_and_the_others_stay(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, value in enumerate([1.0, math.nan, math.inf, 4.0], 1):
        sink.write(StepRecord.of(step, 0.0, {"train/loss/total": value}))
    sink.close()
    assert [e.step for e in read_back(tmp_path).Scalars("train/loss/total")] == [1, 4]


def test_an_alert_is_written_as_text_at_its_step(tmp_path: Path) -> None:
    alert = Alert(rule="r", step=7, metric="a/a/a", value=1.0, threshold=0.0, message="It broke.")
    sink = TensorBoardSink(tmp_path)
    sink.write(alert.to_event(0.0))
    sink.close()
    events = read_back(tmp_path)
    tag = next(t for t in events.Tags()["tensors"] if t.startswith("alerts"))
    (event,) = events.Tensors(tag)
    assert event.step == 7
    assert b"It broke." in event.tensor_proto.string_val[0]


def test_the_projects_layout_is_in_the_event_file(tmp_path: Path) -> None:
    TensorBoardSink(tmp_path).close()
    assert "custom_scalars__config__" in read_back(tmp_path).Tags()["tensors"]


@pytest.mark.parametrize("name", ["grad/norm/param/a/b", "lora/x/module/m"])
def test_a_record_of_hidden_names_only_leaves_no_scalar(tmp_path: Path, name: str) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecord.of(1, 0.0, {name: 1.0}))
    sink.close()
    assert read_back(tmp_path).Tags()["scalars"] == []

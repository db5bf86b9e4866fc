"""The tables of the report: gradients, adapters, interventions, events."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.monitor.report.recorded import INF, NAN, make_run
from ulysses_monitor.reading import RunReader
from ulysses_monitor.report import find_largest_gradients, find_most_unbalanced
from ulysses_monitor.report.tables import list_events


def test_the_largest_gradients_have_a_mean_and_a_share_of_squares(tmp_path: Path) -> None:
    steps = [
        {"grad/norm/total": 5.0, "grad/norm/param/a": 3.0, "grad/norm/param/b": 4.0}
        for _ in range(15)
    ]
    steps[0]["grad/norm/param/a"] = 1e6  # before the last 10 steps
    table = find_largest_gradients(make_run(tmp_path / "r", steps).metrics(), limit=1)
    assert table.to_dict("index") == {"b": pytest.approx({"norm": 4.0, "share": 0.64})}


def test_the_most_unbalanced_modules_lean_either_way_or_are_infinite(tmp_path: Path) -> None:
    values = {"x": 2.0, "low": 0.01, "high": 50.0, "inf": INF, "nan": NAN}
    steps = [{f"lora/grad_ratio_B_A/module/{k}": v for k, v in values.items()}] * 3
    table = find_most_unbalanced(make_run(tmp_path / "r", steps).metrics(), limit=3)
    assert table.index.tolist() == ["inf", "low", "high"]


def test_evaluations_without_an_event_are_listed_between_start_and_stop(run: RunReader) -> None:
    rows = list_events(run, run.metrics("eval/*"))
    assert [(row["step"], row["kind"]) for row in rows] == [
        (0, "start"),
        (6, "eval"),
        (6, "checkpoint"),
        (12, "eval"),
        (12, "stop"),
    ]
    assert rows[0]["details"] == "engine plain, world_size 2"
    assert rows[1]["details"] == "loss 1.900"

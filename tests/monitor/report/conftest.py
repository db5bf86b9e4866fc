from __future__ import annotations

import pytest

from tests.monitor.report.recorded import make_run, step_metrics
from ulysses_monitor.reading import RunReader
from ulysses_monitor.records import Alert, Event


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    """A run of twelve steps with LoRA, a held-out loss, an alert and a checkpoint."""
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

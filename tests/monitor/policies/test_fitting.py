"""Which policies can act in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ulysses_monitor as um


def test_a_training_shorter_than_a_warm_up_runs_and_says_that_the_policy_will_not_act(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, sink = nn.Linear(2, 1), um.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor(
        tmp_path / "run", tensorboard=False, sinks=[sink], policies=[{"zclip": {"warmup": 50}}]
    )
    with monitor.watch(model, optimizer, max_steps=3):
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    told = [event.data for event in sink.events if event.kind == "monitor"]
    assert [data["policy"] for data in told] == ["zclip"]
    assert told[0]["left_out"].startswith("it will not act: it only observes for 50 steps")
    assert "policy zclip is left out: it will not act" in caplog.text

"""An optimizer that holds other parameters than the model: one alert says so at the first step."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import ulysses_monitor as um


def test_an_optimizer_of_another_models_parameters_is_one_clear_alert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=0.01)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False)
    with monitor.watch(model, optimizer):
        for _ in range(4):
            loss = model(torch.randn(16, 4)).square().mean()
            monitor.observe(loss=loss)
            loss.backward()
            optimizer.step()
            model.zero_grad()
    alerts = um.open_run(tmp_path / "run").events("alert").to_dict("records")
    (alert,) = [a for a in alerts if a["severity"] == "critical"]
    assert (alert["rule"], alert["step"]) == ("nothing_moves", 1)
    assert alert["message"].startswith("Step 1: no weight changed, though the gradient norm is ")
    assert alert["causes"][0].startswith("the optimizer holds other parameters than the model")

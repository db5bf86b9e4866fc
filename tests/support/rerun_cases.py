"""Trainings of which a step is computed again, and the same without that."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer, rank, world

__all__ = ["check_fault", "check_rerun"]

AT = 3
"""The step that is computed again."""


def rules(asks: bool) -> list[dict[str, Any]]:
    return [{"train/loss/total > 50": {"name": "high", "on_alert": ["rerun"] if asks else []}}]


class Net(nn.Module):
    """Drops at random, keeps averages, and may be wrong once at `AT`, as broken hardware is."""

    def __init__(self, fault: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.last, self.fault = nn.Linear(8, 1), fault
        self.register_buffer("calls", torch.zeros(()))
        self.made = 0

    def forward(self, x: Tensor) -> Tensor:
        self.made += 1
        self.calls = self.calls + 1  # another tensor each time
        hidden = F.dropout(self.norm(self.first(x)), 0.3, self.training)
        out: Tensor = self.last(hidden)
        return out * 1e4 if self.fault and self.made == 2 * AT else out


def random_numbers() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]  # noqa: NPY002


def train_loop(folder: Path, asks: bool, fault: bool) -> dict[str, Any]:
    """A loop of one's own, alone or under DDP; returns all that a training leaves behind."""
    torch.manual_seed(rank())
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    inner = Net(fault)
    model: Any = nn.parallel.DistributedDataParallel(inner) if world() > 1 else inner
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    torch.manual_seed(rank())
    monitor = um.Monitor(folder, tensorboard=False, rules=rules(asks))
    with monitor.watch(model, optimizer):
        for step in range(1, 6):
            for part in range(2):
                x = torch.randn(6, 4)
                # The data is wrong on the last rank alone.
                is_bad = step == AT and part == 1 and not fault and rank() == world() - 1
                wanted = torch.randn(6, 1) * (1e4 if is_bad else 1)
                loss = (model(x) - wanted).square().mean() / 2
                monitor.observe(loss=loss)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    left = {f"{i}/{key}": value for i, kept in state.items() for key, value in kept.items()}
    return {"numbers": random_numbers(), **left, **inner.state_dict()}


def train_trainer(engine: str, folder: Path, asks: bool) -> dict[str, Any]:
    trainer = build_trainer(engine, folder)
    embed = trainer.model.get_input_embeddings()
    embed.register_forward_hook(lambda module, _, out: F.dropout(out, 0.2, module.training))
    first = [{"train/loss/total > 0": {"name": "high", "cooldown": 99, "clear": 99}}]
    if asks:
        first[0]["train/loss/total > 0"]["on_alert"] = "rerun"
    monitor = um.Monitor(folder / "run", tensorboard=False, rules=first)
    monitor.attach(trainer)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {"numbers": random_numbers(), **model.state_dict()}


def train(engine: str, folder: Path, asks: bool, fault: bool = False) -> dict[str, Any]:
    if engine.startswith("loop"):
        return train_loop(folder / "run", asks, fault)
    return train_trainer(engine, folder, asks)


def check_rerun(engine: str, folder: Path) -> None:
    """A step computed again repeats, and the training is bit by bit the one without it."""
    left = train(engine, folder / "asks", asks=True)
    other = train(engine, folder / "not", asks=False)
    assert left.keys() == other.keys()
    for name, value in left.items():
        same = torch.equal(value, other[name]) if isinstance(value, Tensor) else None
        assert same or value == other[name], name
    if rank() != 0:
        return
    run = um.open_run(folder / "asks" / "run")
    (event,) = run.event_list("rerun")
    assert "error" not in event, event
    assert event["repeats"]
    assert event["outputs_differ"] == 0
    assert event["rules"] == ["high"]
    numbers = run.metrics("train/loss/total", "grad/norm/total").loc[event["step"]]
    if engine.startswith("loop"):
        assert event["loss"] is event["loss_again"] is None  # the model returns none
    else:
        assert abs(event["loss_again"] / event["loss"] - 1) < 1e-9
    assert abs(event["grad_norm_again"] / numbers["grad/norm/total"] - 1) < 1e-4
    if not engine.startswith("loop"):
        assert abs(event["loss"] / numbers["train/loss/total"] - 1) < 1e-4
    assert event["calls"] == 2
    assert event["kept_bytes"] > 0
    (alert,) = run.event_list("alert")
    assert "Computed again, the spike repeats" in alert["message"]
    assert not um.open_run(folder / "not" / "run").event_list("rerun")


def check_fault(engine: str, folder: Path) -> None:
    """A step that was wrong for no reason in the data does not repeat."""
    train(engine, folder, asks=True, fault=True)
    if rank() != 0:
        return
    (event,) = um.open_run(folder / "run").event_list("rerun")
    assert event["step"] == AT
    assert not event["repeats"]
    assert event["verdict"].endswith("it comes from the hardware or from nondeterminism")
    assert event["outputs_differ"] == world()
    assert event["grad_norm_again"] < event["grad_norm"] / 100

"""Any optimizer works: state that it does not keep gives no metric, and never an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.exact_cases import MODELS, batches
from tests.support.exact_engines import merged


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, algorithm 2."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(moment.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=-group["lr"])
                moment.lerp_(p.grad, 1 - group["betas"][1])


class EightBit(torch.optim.Optimizer):
    """Keeps its moments as 8-bit codes under the names that bitsandbytes uses."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state.setdefault("step", 0)
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.uint8)
                state["state1"] = torch.zeros_like(p, dtype=torch.uint8)
                p.sub_(p.grad, alpha=group["lr"])


def adafactor(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-2, relative_step=False, scale_parameter=False)


MAKE: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "transformers adafactor": adafactor,
    "torch adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=1e-2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "lion": lambda ps: Lion(ps, lr=1e-2),
    "8-bit": lambda ps: EightBit(ps, lr=1e-2),
    "tensor rate": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2), foreach=False),
}
FIRST = {"lion", "nadam", "tensor rate", "adamax"}
"""Optimizers that keep a first moment."""
SECOND = {"nadam", "tensor rate", "transformers adafactor"}
"""Optimizers that keep some second moment; Adafactor keeps those of vectors only."""


@pytest.mark.parametrize("name", MAKE)
def test_the_state_and_the_steps_of_any_optimizer_are_measured(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: nn.Module = MODELS["toy"]()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, sink = MAKE[name](trained), um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink], sample_every=1)
    weights = []
    with caplog.at_level(logging.WARNING), monitor.watch(model, optimizer):
        for step in range(3):
            weights.append([p.detach().clone() for p in trained])
            model(batches(step, 1, 1)[0, 0]).backward()
            optimizer.step()
            model.zero_grad()
    assert not [r for r in caplog.records if r.name.startswith("ulysses_monitor")]
    records = merged(sink)
    norm = torch.cat([p.flatten().double() for p in weights[0]]).norm()
    moved = [(a - b).flatten().double() for a, b in zip(weights[1], weights[0], strict=True)]
    truth = float(torch.cat(moved).norm() / norm)
    assert records[0]["optim/update_ratio/total"] == pytest.approx(truth, rel=1e-5)
    moments = [n.split("/")[1] for n in records[2] if n.startswith("optim/exp_avg")]
    known = {
        kind: any(
            records[2][n] == records[2][n] for n in records[2] if n.startswith(f"optim/{kind}/")
        )
        for kind in ("exp_avg_norm", "exp_avg_sq_mean")
    }
    assert known == {"exp_avg_norm": name in FIRST, "exp_avg_sq_mean": name in SECOND}, moments

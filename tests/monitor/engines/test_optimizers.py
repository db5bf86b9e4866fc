"""Any optimizer works: state that it does not keep gives no metric, and never an error."""

from __future__ import annotations

import logging
import math
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


class HalfStep(torch.optim.AdamW):
    """Has AdamW's state and a step of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        loss = super().step(closure)
        for param, old in zip(params, before, strict=True):
            param.lerp_(old, 0.5)
        return loss


class Renamed(torch.optim.AdamW):
    """Inherits the step of AdamW."""


def eight_bit_adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Names its class as bitsandbytes does."""
    return type("Adam", (EightBit,), {})(params, lr=1e-2)  # type: ignore[no-any-return]


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
    "8-bit adam": eight_bit_adam,
    "step of its own": lambda ps: HalfStep(ps, lr=1e-2),
    "inherited step": lambda ps: Renamed(ps, lr=1e-2),
    "tensor rate": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2), foreach=False),
}
ADAM_STATE = {"tensor rate", "step of its own", "inherited step"}
FIRST = {"lion", "nadam", "adamax"} | ADAM_STATE
"""Optimizers that keep a first moment."""
SECOND = {"nadam", "transformers adafactor"} | ADAM_STATE
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
    total = records[2].get("optim/exp_avg_sq_mean/total", math.nan)
    is_whole = name in SECOND - {"transformers adafactor"}
    assert math.isnan(total) != is_whole, "Adafactor factors some second moments"


@pytest.mark.parametrize(
    ("make", "is_measured"),
    [
        (lambda ps: Renamed(ps, lr=1e-2), True),
        (lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True), True),
        (lambda ps: HalfStep(ps, lr=1e-2), False),
        (lambda ps: torch.optim.SGD(ps, lr=1e-2), False),
        (adafactor, False),
        (lambda ps: EightBit(ps, lr=1e-2), False),
        (eight_bit_adam, False),
    ],
)
def test_only_an_adam_whose_step_is_known_is_measured_by_formula(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    is_measured: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ulysses_monitor.probes.updates.COPY_LIMIT", 0)
    records = train_twice(MODELS["toy"](), make, tmp_path)
    assert ("optim/update_ratio/total" in records[0]) == is_measured


def test_a_parameter_that_the_optimizer_does_not_hold_leaves_the_total_of_moments_open(
    tmp_path: Path,
) -> None:
    """Another optimizer may keep its moments; the updates are seen in the weights."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    records = train_twice(model, lambda ps: torch.optim.AdamW(ps[:2], lr=1e-2), tmp_path)
    assert math.isnan(records[1]["optim/exp_avg_norm/total"])
    assert records[1]["optim/exp_avg_norm/param/a.weight"] > 0
    assert records[0]["optim/update_ratio/param/a.weight"] > 0
    assert records[0]["optim/update_ratio/param/b.weight"] == 0


def test_a_layer_with_a_projected_moment_has_no_moment(tmp_path: Path) -> None:
    """GaLore and APOLLO keep Adam's state for vectors, and a projection of it for matrices."""

    class Projected(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            self.state.clear()
            loss = super().step(closure)
            for param, state in self.state.items():
                if param.dim() == 2:
                    state["exp_avg"] = state["exp_avg"][:1]
                    state["exp_avg_sq"] = state["exp_avg_sq"][:1]
            return loss

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(3), nn.Linear(3, 3)])})
    records = train_twice(model, lambda ps: Projected(ps, lr=1e-2), tmp_path)
    for moment in ("exp_avg_norm", "exp_avg_sq_mean"):
        assert records[1][f"optim/{moment}/layer/0"] > 0
        for scope in ("total", "layer/1", "param/layers.1.weight"):
            assert math.isnan(records[1][f"optim/{moment}/{scope}"])


def test_a_step_that_calls_its_parents_step_is_one_step(tmp_path: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # from now on, torch runs hooks in AdamW's own step too
    records = train_twice(MODELS["toy"](), lambda ps: HalfStep(ps, lr=1e-2), tmp_path)
    assert [r["grad/norm/total"] > 0 for r in records] == [True, True]


def train_twice(
    model: nn.Module, make: Callable[[list[Tensor]], torch.optim.Optimizer], folder: Path
) -> list[dict[str, float]]:
    """Takes two steps on the sum of squares of all parameters and returns the metrics of each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, sink = make(trained), um.MemorySink()
    monitor = um.Monitor(folder / "run", tensorboard=False, sinks=[sink], sample_every=1)
    with monitor.watch(model, optimizer):
        for _ in range(2):
            model.zero_grad()
            torch.stack([(p - 0.5).square().sum() for p in trained]).sum().backward()
            optimizer.step()
    return merged(sink)

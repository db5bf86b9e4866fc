"""`optimizer.step(closure)`: the gradients that the closure makes are the ones that are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from tests.support.exact_cases import MODELS, batches
from tests.support.exact_engines import merged

Step = Callable[[torch.optim.Optimizer, Callable[[], Any]], None]


def without_closure(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> None:
    closure()
    optimizer.step()


STEPS: dict[str, Step] = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "by keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


def train(step: Step, folder: Path, policies: Any = None) -> tuple[list[dict[str, float]], Any]:
    """Returns the metrics of three steps without times, and the weights after them."""
    torch.manual_seed(0)
    model: nn.Module = MODELS["toy"]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sink = um.MemorySink()
    monitor = um.Monitor(
        folder, tensorboard=False, sinks=[sink], sample_every=1, policies=policies or []
    )
    with monitor.watch(model, optimizer):
        for number in range(3):
            batch = batches(number, 1, 1)[0, 0]

            def closure(batch: Any = batch) -> Any:
                optimizer.zero_grad()
                loss = model(batch)
                loss.backward()
                return loss

            step(optimizer, closure)
    found = [
        {n: v for n, v in record.items() if not n.startswith(("train/", "monitor/", "system/"))}
        for record in merged(sink)
    ]
    return found, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", STEPS)
def test_a_closure_changes_no_metric(name: str, tmp_path: Path) -> None:
    expected, weights = train(without_closure, tmp_path / "without")
    found, same_weights = train(STEPS[name], tmp_path / "with")
    assert [sorted(record) for record in found] == [sorted(record) for record in expected]
    for record, other in zip(found, expected, strict=True):
        assert record == pytest.approx(other, rel=0, abs=0, nan_ok=True)
    assert torch.equal(weights, same_weights)


@pytest.mark.parametrize("name", STEPS)
def test_an_action_counts_for_the_step_whose_gradients_it_saw(name: str, tmp_path: Path) -> None:
    """The second step is skipped."""

    def skip_second(history: list[um.StepRecord]) -> list[um.Action]:
        return [um.Action(kind="skip")] if history[-1].step == 2 else []

    _, expected = train(without_closure, tmp_path / "without", [skip_second])
    _, weights = train(STEPS[name], tmp_path / "with", [skip_second])
    assert torch.equal(weights, expected)
    assert not torch.equal(weights, train(without_closure, tmp_path / "no policy")[1])


def test_an_optimizer_that_calls_its_closure_several_times_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with (
        pytest.raises(um.InputError, match="the optimizer is LBFGS, which calls its closure"),
        um.Monitor(tmp_path / "run").watch(model, torch.optim.LBFGS(model.parameters())),
    ):
        pass

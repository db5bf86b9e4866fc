"""An optimizer that steps during the backward pass leaves nothing to read, and is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def by_transformers(model: nn.Module) -> torch.optim.Optimizer:
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    return LayerWiseDummyOptimizer(optimizer_dict={p: sgd(model) for p in model.parameters()})


def by_lomo(model: nn.Module) -> torch.optim.Optimizer:
    class Lomo(torch.optim.SGD):
        def fused_backward(self, loss: Any, lr: float) -> None: ...

    return Lomo(model.parameters(), lr=0.1)


def by_torch(model: nn.Module) -> torch.optim.Optimizer:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.AdamW, model.parameters(), {"lr": 0.1})
    return sgd(model)


def by_a_hook(model: nn.Module) -> torch.optim.Optimizer:
    """As in torch's tutorial."""
    optimizers = {p: torch.optim.Adam([p]) for p in model.parameters()}

    def hook(param: Any) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    return sgd(model)


def by_a_partial(model: nn.Module) -> torch.optim.Optimizer:
    def hook(optimizer: Any, param: Any) -> None:
        optimizer.step()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(functools.partial(hook, torch.optim.Adam([param])))
    return sgd(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (by_transformers, r"LayerWiseDummyOptimizer, .* give optim without _layerwise"),
        (by_lomo, "the optimizer is Lomo, which updates each parameter during the backward pass"),
        (by_torch, "parameter weight is updated during the backward pass by AdamW; expected"),
        (by_a_hook, "parameter weight is updated during the backward pass by Adam; expected"),
        (by_a_partial, "parameter weight is updated during the backward pass by Adam; expected"),
    ],
)
def test_an_update_during_the_backward_pass_is_refused_with_what_to_do(
    make: Callable[[nn.Module], torch.optim.Optimizer], message: str, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    optimizer = make(model)
    with (
        pytest.raises(um.InputError, match=message) as refusal,
        um.Monitor(tmp_path / "run").watch(model, optimizer),
    ):
        pass
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_hook_that_updates_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    model, norms = nn.Linear(2, 2), []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    optimizer, sink = sgd(model), um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink])
    with monitor.watch(model, optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert len(norms) == 2
    assert sink.records[0]["grad/norm/total"] > 0

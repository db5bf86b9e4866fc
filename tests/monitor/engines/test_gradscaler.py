"""A GradScaler in its odd uses: what is read is right, or the use is refused as by torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from tests.support.exact_engines import merged

Make = Callable[[Any], torch.optim.Optimizer]
CLIP = 0.05


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def build(make: Make = sgd) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)


def watch(folder: Path, *given: Any, **options: Any) -> tuple[Any, um.MemorySink]:
    sink = um.MemorySink()
    monitor = um.Monitor(folder / "run", tensorboard=False, sinks=[sink], sample_every=1)
    return monitor.watch(*given, **options), sink


def backward(model: nn.Module, scaler: Any, factor: float = 1.0) -> float:
    """Returns the norm of the gradient without the scale."""
    loss = model(torch.ones(1, 3)).square().sum() * factor
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    return float(torch.cat([g.double().flatten() for g in grads]).norm())


@pytest.mark.parametrize(("args", "kwargs"), [((float,), {}), ((), {"closure": float})])
def test_a_closure_is_refused_as_torch_does(args: Any, kwargs: Any, tmp_path: Path) -> None:
    model, optimizer, scaler = build()
    watching, sink = watch(tmp_path, model, optimizer, scaler=scaler)
    with watching:
        backward(model, scaler)
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, *args, **kwargs)
        optimizer.zero_grad()
        norm = backward(model, scaler, 2.0)
        scaler.step(optimizer, None)
        scaler.update()
    (record,) = merged(sink)
    assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_a_second_optimizer_of_the_same_scaler_is_left_alone(first: bool, tmp_path: Path) -> None:
    model, optimizer, scaler = build()
    other = nn.Linear(3, 2)
    second = sgd(other.parameters())
    watching, sink = watch(tmp_path, model, optimizer, scaler=scaler)
    norms = []
    with watching:
        for _ in range(2):
            norms.append(backward(model, scaler))
            backward(other, scaler, 3.0)
            scaler.unscale_(second)
            nn.utils.clip_grad_norm_(other.parameters(), CLIP)
            for each in (second, optimizer) if first else (optimizer, second):
                scaler.step(each)
            scaler.update()
            optimizer.zero_grad()
            second.zero_grad()
    records = merged(sink)
    assert [r["grad/norm/total"] for r in records] == pytest.approx(norms, rel=1e-6)
    assert [r["grad/clip_coef/total"] for r in records] == [1.0, 1.0]


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("knows_scaler", [True, False])
def test_unscaling_before_clipping_gives_the_norm_before_it(
    says: bool, knows_scaler: bool, tmp_path: Path
) -> None:
    model, optimizer, scaler = build()
    watching, sink = watch(tmp_path, model, optimizer, scaler=scaler if knows_scaler else None)
    norms = []
    with watching as monitor:
        for _ in range(2):
            norms.append(backward(model, scaler))
            scaler.unscale_(optimizer)
            if says:
                monitor.before_clip()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for record, norm in zip(merged(sink), norms, strict=True):
        assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
        assert record["grad/clip_coef/total"] == pytest.approx(CLIP / (norm + 1e-6), rel=1e-5)


def test_a_step_that_a_fused_optimizer_skips_moved_nothing(tmp_path: Path) -> None:
    """The scaler calls a fused step after an overflow too."""
    model, optimizer, scaler = build(lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True))
    watching, sink = watch(tmp_path, model, optimizer, scaler=scaler)
    weights = []
    with watching:
        for step in range(6):
            weights.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
            backward(model, scaler, torch.inf if step in (0, 3) else 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for step, record in enumerate(merged(sink)[:5]):
        moved = float((weights[step + 1] - weights[step]).norm() / weights[step].norm())
        assert record["optim/update_ratio/total"] == pytest.approx(moved, rel=1e-4), step
        assert (moved == 0) == (step in (0, 3))


def test_an_overflow_under_a_scaler_that_watch_does_not_know_is_never_the_next_steps_norm(
    tmp_path: Path,
) -> None:
    model, optimizer, scaler = build()
    watching, sink = watch(tmp_path, model, optimizer)
    norms = []
    with watching:
        for turn in range(4):
            norms.append(backward(model, scaler, torch.inf if turn == 1 else 1.0))
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    records = merged(sink)
    assert ["grad/norm/total" in r for r in records] == [True, False, True]
    assert records[0]["grad/norm/total"] == pytest.approx(norms[0], rel=1e-6)
    assert records[2]["grad/norm/total"] == pytest.approx(norms[3], rel=1e-6)
    (told,) = [e.data["clipping"] for e in sink.events if "clipping" in e.data]
    assert "give watch() the GradScaler" in told

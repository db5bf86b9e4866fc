"""A plain loop that clips: the norm before clipping is recorded, however the loop clips."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import ulysses_monitor as um
from tests.support.exact_engines import merged

CLIP = 1e-2
Clip = Callable[[nn.Module], object]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def norm_of(model: nn.Module) -> float:
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm())


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def train(
    clip: Callable[[nn.Module, um.Monitor], object], folder: Path, policies: Any = None
) -> tuple[list[dict[str, float]], list[float], list[str]]:
    """Returns the records, the true norms before clipping, and what was told about clipping."""
    model, sink, norms = build(), um.MemorySink(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor(folder, tensorboard=False, sinks=[sink], policies=policies or [])
    with monitor.watch(model, optimizer):
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed).backward()
            norms.append(norm_of(model))
            clip(model, monitor)
            optimizer.step()
    told = [e.data["clipping"] for e in sink.events if "clipping" in e.data]
    return merged(sink), norms, told


def by_keyword(model: nn.Module, _: Any) -> None:
    clip_grad_norm_(parameters=model.parameters(), max_norm=CLIP, foreach=False)


def by_module(model: nn.Module, _: Any) -> None:
    nn.utils.clip_grad_norm_(list(model.parameters()), CLIP)


def by_accelerate(model: nn.Module, _: Any) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).clip_grad_norm_(model.parameters(), CLIP)


@pytest.mark.parametrize(
    "clip",
    [
        lambda model, _: clip_grad_norm_(model.parameters(), CLIP),
        by_keyword,
        by_module,
        by_accelerate,
    ],
)
def test_the_norm_before_clipping_is_recorded_and_the_factor_is_known(
    clip: Any, tmp_path: Path
) -> None:
    records, norms, told = train(clip, tmp_path / "run")
    for record, norm in zip(records, norms, strict=True):
        assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
        assert record["grad/clip_coef/total"] == pytest.approx(CLIP / (norm + 1e-6), rel=1e-5)
        assert norm > 2 * CLIP
    assert told == []


def with_a_norm_of_its_own(model: nn.Module, _: Any) -> None:
    params = list(model.parameters())
    norm = get_total_norm([p.grad for p in params if p.grad is not None])
    clip_grads_with_norm_(params, CLIP, norm)


def one_by_one(model: nn.Module, _: Any) -> None:
    for param in model.parameters():
        clip_grad_norm_(param, CLIP)


def by_value_and_norm(model: nn.Module, _: Any) -> None:
    clip_grad_value_(model.parameters(), 1e-3)
    clip_grad_norm_(model.parameters(), CLIP)


@pytest.mark.parametrize(
    "clip",
    [
        lambda model, _: clip_grad_value_(model.parameters(), 1e-3),
        lambda model, _: clip_grad_norm_(model.parameters(), CLIP, norm_type=math.inf),
        with_a_norm_of_its_own,
        one_by_one,
        by_value_and_norm,
    ],
)
def test_clipping_without_one_known_factor_has_a_norm_and_no_factor(
    clip: Any, tmp_path: Path
) -> None:
    records, norms, told = train(clip, tmp_path / "run")
    for record, norm in zip(records, norms, strict=True):
        assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
        assert "grad/clip_coef/total" not in record
    assert told == []


def before_clip_too_late(model: nn.Module, monitor: um.Monitor) -> None:
    clip_grad_norm_(model.parameters(), CLIP)
    monitor.before_clip()


def test_before_clip_after_clipping_is_told_once_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records, norms, told = train(before_clip_too_late, tmp_path / "run")
    for record, norm in zip(records, norms, strict=True):
        assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
        assert record["grad/clip_coef/total"] == pytest.approx(CLIP / (norm + 1e-6), rel=1e-5)
    (message,) = told
    assert message.startswith("before_clip() came after the loop had clipped")
    assert caplog.text.count("before_clip() came after") == 1


def by_hand(model: nn.Module, monitor: um.Monitor) -> None:
    monitor.before_clip()
    for param in model.parameters():
        assert param.grad is not None
        param.grad.mul_(0.5)


def before_clip_and_torch(model: nn.Module, monitor: um.Monitor) -> None:
    monitor.before_clip()
    clip_grad_norm_(model.parameters(), CLIP)


@pytest.mark.parametrize(
    ("clip", "factor"),
    [
        (lambda *_: None, lambda _: 1.0),
        (lambda _, monitor: monitor.before_clip(), lambda _: 1.0),
        (lambda model, _: clip_grad_norm_(model.parameters(), math.inf), lambda _: 1.0),
        (lambda model, _: clip_grad_norm_(model.parameters(), 1e6), lambda _: 1.0),
        (by_hand, lambda _: None),
        (before_clip_and_torch, lambda norm: CLIP / (norm + 1e-6)),
    ],
)
def test_the_factor_is_1_where_nothing_clips_and_absent_where_it_is_unknown(
    clip: Any, factor: Any, tmp_path: Path
) -> None:
    records, norms, told = train(clip, tmp_path / "run")
    for record, norm in zip(records, norms, strict=True):
        assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
        expected = factor(norm)
        assert ("grad/clip_coef/total" in record) == (expected is not None)
        if expected is not None:
            assert record["grad/clip_coef/total"] == pytest.approx(expected, rel=1e-5)
    assert told == []


def test_clipping_sees_gradients_that_a_policy_edited(tmp_path: Path) -> None:
    def double(history: list[um.StepRecord]) -> list[um.Action]:
        return [um.Action(kind="scale", targets=("*",), values={"factor": 2.0})]

    records, norms, _ = train(by_module, tmp_path / "run", [double])
    for record, norm in zip(records, norms, strict=True):
        assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
        assert record["grad/clip_coef/total"] == pytest.approx(CLIP / (2 * norm), rel=1e-3)


def test_clipping_another_model_reads_nothing(tmp_path: Path) -> None:
    """Between two micro-batches, so that reading too early would show."""
    model, other, sink = build(), build(), um.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink]).watch(model, optimizer):
        backward(model, 0).backward()
        backward(other, 0).backward()
        clip_grad_norm_(other.parameters(), CLIP)
        backward(model, 1).backward()
        norm = norm_of(model)
        optimizer.step()
    record = merged(sink)[0]
    assert record["grad/norm/total"] == pytest.approx(norm, rel=1e-6)
    assert record["grad/clip_coef/total"] == 1.0


def test_clipping_each_micro_batch_costs_the_gradient_metrics_and_is_told_once(
    tmp_path: Path,
) -> None:
    model, sink = build(), um.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink]).watch(model, optimizer):
        for step in range(3):
            for seed in range(2):
                backward(model, 2 * step + seed).backward()
                clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    records = merged(sink)
    assert [("grad/norm/total" in r, "param/norm/total" in r) for r in records] == [
        (False, True),
        (False, False),
        (False, False),
    ]
    told = [e.data["clipping"] for e in sink.events if "clipping" in e.data]
    assert [t.split(" within")[0] for t in told] == [
        "the loop clipped, changed the gradients and clipped again"
    ]


@pytest.mark.parametrize("error", [TypeError, StopAsyncIteration])
def test_torchs_own_errors_and_warnings_are_unchanged(error: Any, tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def params() -> Any:
        yield next(model.parameters())
        raise error

    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer):
        with pytest.raises(error):
            clip_grad_norm_(params(), 1.0)
        with pytest.warns(UserWarning, match="is an empty generator"):
            clip_grad_norm_((p for p in ()), 1.0)
        with pytest.raises(TypeError, match="not iterable"):
            clip_grad_norm_(3, 1.0)  # type: ignore[arg-type]


def test_after_the_loop_torchs_functions_are_as_before(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    functions = (clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_)

    def inner() -> list[Any]:
        return [[c.cell_contents for c in f.__closure__ or ()] for f in functions]  # type: ignore[attr-defined]

    before = inner()
    outer = um.Monitor(tmp_path / "outer", tensorboard=False)
    with outer.watch(model, optimizer):
        assert inner() != before
        with um.Monitor(tmp_path / "inner", tensorboard=False).watch(model, optimizer):
            backward(model, 0).backward()
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    assert inner() == before
    names = ("outer", "inner")
    norms = [um.open_run(tmp_path / n).metrics("grad/norm/total").iloc[0, 0] for n in names]
    assert norms[0] == norms[1] > CLIP

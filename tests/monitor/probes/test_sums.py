"""Sums over shards are right at every size and precision, by kernels and by torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ulysses_monitor.probes import kernels, sums
from ulysses_monitor.probes.adam_step import AdamStep
from ulysses_monitor.probes.sums import (
    finite_statistics,
    statistics,
    statistics_by_torch,
    statistics_in_float64,
)
from ulysses_monitor.probes.updates import adam_change_by_torch

Statistics = Callable[[Sequence[Tensor]], Tensor]


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[statistics, statistics_in_float64, statistics_by_torch, finite_statistics])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """Statistics by kernels, by torch in float64 and in small pieces, and over finite elements."""
    monkeypatch.setattr(sums, "GPU_PIECE", 1 << 12)
    return request.param


def truth(x: Tensor) -> list[float]:
    wide = x.double()
    rows = wide.square().sum(), wide.abs().sum(), wide.abs().max(), (wide != 0).sum()
    return [float(row) for row in rows]


@pytest.mark.parametrize("way", [statistics, statistics_in_float64])
def test_a_sum_of_20_million_squares_is_right_although_torchs_norm_is_not(
    way: Statistics, threads: int
) -> None:
    x = torch.randn(20_000_003, generator=torch.Generator().manual_seed(0)) * 1e-3
    naive = float(torch.linalg.vector_norm(x).double().square())
    squares = truth(x)[0]
    assert way([x])[:, 0].tolist() == pytest.approx(truth(x), rel=1e-12)
    assert abs(naive / squares - 1) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 63, 4097, (1 << 18) + 5, (1 << 19) + 1])
def test_statistics_are_right_at_every_size(
    ways: Statistics, threads: int, size: int, dtype: torch.dtype
) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    x[::7] = 0.0
    found = ways([torch.ones(3).to(dtype), x])[:4, 1]
    assert found.tolist() == pytest.approx(truth(x), rel=2e-6)


def test_tensors_of_mixed_sizes_shapes_and_precisions_keep_their_order(ways: Statistics) -> None:
    tensors = [
        torch.full((3,), 2.0),
        torch.full((4097,), -1.0, dtype=torch.bfloat16),
        torch.full((2, 2), 3.0, dtype=torch.float64),
        torch.full((2, 3), 4.0, dtype=torch.float16).t(),
    ]
    found = ways(tensors)[:4]
    for i, tensor in enumerate(tensors):
        assert found[:, i].tolist() == pytest.approx(truth(tensor), rel=1e-7)


@pytest.mark.parametrize("way", [statistics, statistics_in_float64, statistics_by_torch])
def test_a_rank_that_holds_nothing_of_a_parameter_sends_zeros(way: Statistics) -> None:
    empty, some = torch.zeros(0), torch.full((2,), 3.0)
    found = way([empty, some, empty])
    assert found[:, 1].tolist() == pytest.approx([18, 6, 3, 2], rel=1e-6)
    assert not found[:, [0, 2]].any()
    assert way([empty]).tolist() == [[0.0]] * 4
    assert statistics([]).shape == (4, 0)


def test_half_precision_does_not_overflow_in_the_sum(ways: Statistics) -> None:
    x = torch.full((64,), 60_000.0, dtype=torch.float16)
    assert float(ways([x])[0, 0]) == pytest.approx(truth(x)[0], rel=1e-6)


def test_the_smallest_and_the_largest_numbers_are_measured(ways: Statistics) -> None:
    """Subnormal numbers are not zeros; the largest magnitude may be of a negative number."""
    x = torch.tensor([1e-42, -3.0, 0.0, -0.0, 2.0], dtype=torch.float32)
    assert ways([x])[2:4, 0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", [statistics, statistics_in_float64, statistics_by_torch])
def test_a_nonfinite_element_makes_the_statistics_nonfinite(way: Statistics, bad: float) -> None:
    x = torch.ones(1 << 20)
    x[777_777] = bad
    found = way([torch.ones(5), x])
    assert found[:, 0].tolist() == pytest.approx([5.0, 5.0, 1.0, 5.0], rel=1e-6)
    assert not found[:3, 1].isfinite().any()


def test_nonfinite_elements_are_counted_and_left_out_of_the_rest() -> None:
    x = torch.ones(10_000)
    x[7], x[9_999], x[0], x[1] = math.nan, math.inf, -math.inf, 0.0
    assert finite_statistics([x])[:, 0].tolist() == [9996.0, 9996.0, 1.0, 9999.0, 3.0]


def test_statistics_do_not_change_the_tensors(ways: Statistics) -> None:
    x = torch.randn(4097)
    before = x.clone()
    ways([x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("by", ["kernels", "torch"])
@pytest.mark.parametrize(
    "settings", [{"weight_decay": 0.3}, {"weight_decay": 0.0, "eps": 1e-3}, {"lr": 0.0}]
)
def test_adams_change_follows_from_its_state(
    threads: int, by: str, settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares with AdamW's own parameters in float64, before and after its third step."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(7,), (300, 1001), (1 << 19) + 3]
    params = [torch.randn(size, generator=generator).double().requires_grad_() for size in sizes]
    adam = torch.optim.AdamW(params, **({"lr": 1e-2, "betas": (0.8, 0.9)} | settings))
    group = adam.param_groups[0]
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).double()
        adam.step()
    step = AdamStep(
        group["lr"] / (1 - 0.8**3), (1 - 0.9**3) ** -0.5, group["eps"],
        -group["lr"] * group["weight_decay"],
    )  # fmt: skip
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        parts = [
            (p.detach(), adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"]) for p in params
        ]
        steps = [(step, [t.to(dtype) for t in tensors]) for tensors in parts]
        if by == "kernels":
            found = kernels.adam_changes(steps)
        else:
            monkeypatch.setattr("ulysses_monitor.probes.updates.PIECE", 1 << 12)
            found = torch.stack([adam_change_by_torch(*s) for s in steps], dim=1)
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            assert float(found[1, i]) == pytest.approx(float(old.square().sum()), rel=bound)
            change = float((p.detach() - old).square().sum())
            # The rounding of before + update in float32 shows if the change is only decay.
            assert float(found[0, i]) == pytest.approx(change, rel=4 * bound, abs=1e-20)


def test_no_adam_steps_give_no_columns() -> None:
    assert kernels.adam_changes([]).shape == (2, 0)

"""The exchange against slicing on one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.spawn import spawn
from ulysses_core.parallel import SequenceGroup, check_size, make_groups
from ulysses_core.parallel.exchange import gather_heads, plan_heads, scatter_heads
from ulysses_monitor.common.errors import InputError

ROWS, SLICE, WIDTH = 2, 3, 5
CASES = [
    (2, 4, 4),
    (2, 4, 2),
    (2, 4, 1),
    (2, 3, 3),
    (2, 1, 1),
    (3, 4, 2),
    (4, 6, 2),
    (4, 3, 3),
    (4, 12, 3),
    (5, 12, 4),
    (8, 8, 2),
    (8, 6, 1),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("key_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ratio", [1, 2, 3, 7])
def test_a_plan_gives_every_query_head_to_one_rank_with_the_key_heads_it_uses(
    ranks: int, key_heads: int, ratio: int
) -> None:
    heads = key_heads * ratio
    plan = plan_heads(heads, key_heads, ranks)
    shared = [q for a, b in plan.query for q in range(a, b)]
    assert shared == list(range(heads))
    sizes = [b - a for a, b in plan.query]
    assert max(sizes) - min(sizes) <= 1
    for rank in range(ranks):
        (q0, q1), (k0, k1) = plan.query[rank], plan.key[rank]
        used = sorted({q // ratio for q in range(q0, q1)})
        assert used == list(range(k0, k1))
        assert [k0 + k for k in plan.key_indices(rank)] == [q // ratio for q in range(q0, q1)]


def whole(heads: int, key_heads: int, ranks: int) -> list[Tensor]:
    """q, k and v of whole rows, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (SLICE * ranks, WIDTH)
    return [
        torch.randn(ROWS, n, *shape, generator=generator, dtype=torch.float64)
        for n in (heads, key_heads, key_heads)
    ]


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Something that is not linear and mixes tokens, head by head."""
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


def exchange(cases: list[tuple[int, int, int]]) -> list[dict[str, float]]:
    """The child: each case with its first `ranks` ranks; the worst relative errors."""
    results = []
    for ranks, heads, key_heads in cases:
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            results.append(exchange_one(ranks, heads, key_heads, group))
    return results


def exchange_one(ranks: int, heads: int, key_heads: int, process_group: Any) -> dict[str, float]:
    rank, plan = dist.get_rank(), plan_heads(heads, key_heads, ranks)
    group = SequenceGroup(ranks, rank, process_group, 0, 1)
    rows = [t.requires_grad_() for t in whole(heads, key_heads, ranks)]
    mine = slice(rank * SLICE, (rank + 1) * SLICE)
    slices = [t.detach()[:, :, mine].clone().requires_grad_() for t in rows]
    q, k, v = scatter_heads(*slices, plan, group)
    (q0, q1), (k0, k1) = plan.query[rank], plan.key[rank]
    scattered = max(
        worst(q, rows[0][:, q0:q1]), worst(k, rows[1][:, k0:k1]), worst(v, rows[2][:, k0:k1])
    )
    identity = gather_heads(q, plan, group)
    gathered = worst(identity, slices[0].transpose(1, 2))
    index = torch.tensor(plan.key_indices(rank), dtype=torch.long)
    out = gather_heads(mix(q, k[:, index], v[:, index]), plan, group)
    ratio = heads // key_heads
    truth = mix(rows[0], *(t.repeat_interleave(ratio, dim=1) for t in rows[1:]))
    forward = worst(out, truth[:, :, mine].transpose(1, 2))
    weight = torch.linspace(0.5, 1.5, truth.numel(), dtype=torch.float64).view_as(truth)
    (truth * weight).sum().backward()
    (out * weight[:, :, mine].transpose(1, 2)).sum().backward()
    backward = max(
        worst(part.grad, row.grad[:, :, mine]) for part, row in zip(slices, rows, strict=True)
    )
    return {"scatter": scattered, "gather": gathered, "forward": forward, "backward": backward}


def worst(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape, f"{tuple(got.shape)} is not {tuple(truth.shape)}"
    if not got.numel():
        return 0.0
    return float((got.detach() - truth.detach()).norm() / truth.detach().norm())


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, int, int], list[dict[str, float]]]:
    by_rank = spawn(exchange, 8, args=[CASES], timeout=120)
    found: dict[tuple[int, int, int], list[dict[str, float]]] = {}
    for case in CASES:
        found[case] = [by_rank[rank].pop(0) for rank in range(case[0])]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_exchange_and_its_gradient_equal_one_process(
    results: dict[tuple[int, int, int], list[dict[str, float]]], case: tuple[int, int, int]
) -> None:
    for errors in results[case]:
        assert errors["scatter"] == 0.0  # it only moves values
        assert errors["gather"] == 0.0
        assert errors["forward"] < 1e-14
        assert errors["backward"] < 1e-13


def test_the_cases_include_one_with_a_rank_without_heads() -> None:
    assert any(ranks > heads for ranks, heads, _ in CASES)


def test_the_error_about_a_size_that_does_not_divide_the_processes_names_those_that_do() -> None:
    check_size(3, 6)
    with pytest.raises(InputError, match=r"is 4, which does not divide 6 pro.*: 1, 2, 3, 6, or"):
        check_size(4, 6)
    with pytest.raises(InputError, match="is 2, which does not divide 1 process;"):
        make_groups(2)
    with pytest.raises(InputError, match="expected an integer of 1 or more"):
        check_size(0, 4)


def test_one_process_is_a_group() -> None:
    group = make_groups(1)
    assert (group.size, group.rank, group.data_rank, group.data_size) == (1, 0, 0, 1)
    assert group.group is None

"""Training with sequence parallelism against the same training on one process, in float64.

Weights are compared after two SGD steps, for each parameter relative to its norm. Adam would hide
a wrong scale, and an absolute tolerance would hide a wrong small parameter.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.sequence_cases import Case, build_model, train_all
from tests.support.spawn import spawn

TWO = [
    Case(),
    Case(heads=3, key_heads=3),
    Case(key_heads=1, accumulate=3, rows=1),
    Case(rows=7, data="short_epoch"),
    Case(rows=2, accumulate=3, data="short_epoch"),
    Case(data="no_label_in_a_slice"),
    Case(data="label_on_the_edge"),
    Case(data="left"),
    Case(data="packed"),
    Case(checkpointing=True),
    *(Case(model=m) for m in ("qwen2", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "qwen3_moe")),
    Case(model="gemma2", data="packed"),
    Case(heads=6, key_heads=3, data="packed"),
    Case(model="mistral"),
    Case(model="mistral", data="packed"),
    Case(zero=0),
    Case(zero=1),
    Case(zero=1, accumulate=3, rows=1, data="packed"),
    Case(zero=2),
    Case(zero=2, accumulate=3, rows=2, data="short_epoch"),
    Case(zero=3),
    Case(zero=3, accumulate=3, rows=1, key_heads=4, data="packed"),
    Case(has_policy=True),
    Case(has_policy=True, zero=1),
    Case(has_policy=True, zero=2),
    Case(has_policy=True, zero=3),
]
FOUR = [
    Case(size=2, groups=2, rows=2, evaluated=6, has_policy=True),
    Case(size=2, groups=2, rows=2, evaluated=6),
    Case(size=4, groups=1),
    Case(size=2, groups=2, rows=1, accumulate=3, zero=2, evaluated=6),
]


def grid(size: int, zero: int | None) -> list[Case]:
    """Returns the cases on four ranks: heads, accumulation and packing."""
    return [
        Case(
            size=size,
            groups=4 // size,
            rows=1,
            zero=zero,
            heads=heads,
            key_heads=key_heads,
            accumulate=accumulate,
            evaluated=6 if size > 1 else 12,
            data=data,
        )
        for heads, key_heads in ((4, 4), (4, 2), (4, 1), (6, 3), (3, 3), (6, 6))
        for accumulate in (1, 3)
        for data in ("ragged", "packed")
    ]


def settings_of(cases: list[Case]) -> list[dict]:
    return [vars(case) for case in cases]


def alone(cases: list[Case]) -> dict[str, Any]:
    unique = {case.alone.label: case.alone for case in cases}
    return spawn(train_all, 1, args=[settings_of(list(unique.values()))], timeout=200)[0]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return alone([*TWO, *FOUR])


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return spawn(train_all, 2, args=[settings_of(TWO)], timeout=200)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return spawn(train_all, 4, args=[settings_of(FOUR)], timeout=200)


def assert_same_training(results: list[dict], one: dict[str, Any], case: Case) -> None:
    truth = one[case.alone.label]
    assert "error" not in truth, truth["error"]
    # ZeRO keeps its master weights in float32, and Gemma computes norms and softmax in it.
    bound = 1e-6 if case.zero is not None or case.model.startswith("gemma") else 1e-12
    start = build_model(case).state_dict()
    for result in (each[case.label] for each in results):
        assert "error" not in result, result["error"]
        moved = 0.0
        for name, weight in truth["weights"].items():
            error = float((result["weights"][name] - weight).norm() / weight.norm())
            assert error <= bound, f"{name}: relative error {error}"
            moved = max(moved, float((weight - start[name]).norm() / weight.norm()))
        assert moved > 1e-4  # otherwise there is nothing to compare
        assert result["losses"] == pytest.approx(truth["losses"], rel=1e-4)
        for name, value in truth["eval"].items():
            # Without sequence parallelism, transformers' own evaluation weighs the batches of
            # several ranks by their tokens, but gives all batches of one process the same weight.
            if name == "eval_loss" and case.size == 1:
                continue
            assert result["eval"][name] == pytest.approx(value, rel=1e-5), name
    assert_same_metrics(results[0][case.label]["metrics"], truth["metrics"])


def assert_same_metrics(records: list[dict], truths: list[dict]) -> None:
    """Compares loss and gradient norms, which show a wrong scale of the gradients directly."""
    assert len(records) == len(truths) == 2
    for record, truth in zip(records, truths, strict=True):
        assert record["train/loss_tokens/total"] == truth["train/loss_tokens/total"]
        assert record["train/loss/total"] == pytest.approx(truth["train/loss/total"], rel=1e-5)
        for name in (n for n in truth if n.startswith("grad/norm/")):
            assert record[name] == pytest.approx(truth[name], rel=1e-5, abs=1e-12), name


@pytest.mark.parametrize("case", TWO, ids=lambda c: c.label)
def test_training_on_two_ranks_equals_one_process(
    two: list[dict], one: dict[str, Any], case: Case
) -> None:
    assert_same_training(two, one, case)


@pytest.mark.parametrize("case", FOUR, ids=lambda c: c.label)
def test_training_on_four_ranks_equals_one_process(
    four: list[dict], one: dict[str, Any], case: Case
) -> None:
    assert_same_training(four, one, case)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_grid_on_four_ranks_equals_one_process(size: int, zero: int | None) -> None:
    cases = grid(size, zero)
    truth = alone(cases)
    results = spawn(train_all, 4, args=[settings_of(cases)], timeout=400)
    for case in cases:
        assert_same_training(results, truth, case)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_eight_ranks_with_fewer_heads_equal_one_process() -> None:
    cases = [Case(size=8), Case(size=8, heads=6, key_heads=3, data="packed", zero=2)]
    truth = alone(cases)
    for case in cases:
        assert_same_training(
            spawn(train_all, 8, args=[settings_of(cases)], timeout=200), truth, case
        )

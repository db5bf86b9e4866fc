"""Compares metrics under every engine with the same training on one process in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.exact_cases import Case
from tests.support.exact_engines import run_cases, train
from tests.support.spawn import spawn


def errors_of(cases: list[Case], world: int, folder: Path, timeout: float) -> list[dict]:
    return spawn(
        run_cases, world, args=[[vars(case) for case in cases], str(folder)], timeout=timeout
    )


def assert_exact(results: dict[str, Any], case: Case) -> None:
    bounds = BOUNDS[case.bits]
    assert "error" not in results[case.label], results[case.label]["error"]
    worst = results[case.label]["worst"]
    assert {"grad/norm", "grad/max", "param/norm", "optim/update_ratio"} <= worst.keys()
    too_far = {f: e for f, e in worst.items() if e > bounds.get(f, bounds["all"])}
    assert not too_far, f"{case.label}: {worst}"


FP32 = {"all": 1e-5, "grad/nonfinite": 0.0}
BF16 = {
    "all": 2e-2,
    "grad/max": 5e-2,
    "optim/update_ratio": 5e-2,
    "grad/zero_frac": math.inf,
    "grad/nonfinite": 0.0,
}
FP16 = {"all": 3e-3, "grad/max": 1e-2, "grad/zero_frac": math.inf, "grad/nonfinite": 0.0}
"""bf16 keeps 8 bits, so each element is off by up to 2^-9. Three layers and a sum make that a few
times as much; a single largest element, and what Adam divides by its own root, are off by more.
fp16 keeps 11 bits and rounds small gradients to zero. They are counted as zeros, and float64 has
none to compare with. The reference starts from the rounded weights."""

BOUNDS = {"fp32": FP32, "bf16": BF16, "bf16acc32": BF16, "fp16": FP16, "amp": FP16}

ONE = [
    Case(engine="plain"),
    Case(engine="plain", accumulate=3, clip=0.1),
    Case(engine="plain", model="tied"),
    Case(engine="plain", model="lora", clip=0.01),
    Case(engine="plain", model="fresh_lora"),
    Case(engine="plain", model="dora"),
    Case(engine="plain", model="rslora"),
    Case(engine="plain", model="embedding_lora"),
    Case(engine="plain", model="two_adapters"),
    Case(engine="plain", optimizer="foreach"),
    Case(engine="plain", optimizer="fused", accumulate=2),
    Case(engine="plain", optimizer="adam", clip=0.1),
    Case(engine="plain", optimizer="sgd"),
    Case(engine="plain", bits="amp", clip=0.1, accumulate=2),
    Case(engine="plain", bits="bf16"),
]
TWO = [
    Case(engine="ddp"),
    Case(engine="ddp", accumulate=3, clip=0.1),
    Case(engine="ddp", model="lora"),
    Case(engine="ddp", bits="amp"),
    Case(engine="zero0", accumulate=3, clip=0.1),
    Case(engine="zero0", bits="bf16", clip=0.1),
    Case(engine="zero0", bits="fp16", clip=0.1),
    Case(engine="zero1"),
    Case(engine="zero1", accumulate=3, clip=0.1),
    Case(engine="zero1", bits="bf16"),
    Case(engine="zero1", bits="bf16acc32", clip=0.1, accumulate=3),
    Case(engine="zero1-offload", clip=0.1),
    Case(engine="zero2", clip=0.1),
    Case(engine="zero2", accumulate=3),
    Case(engine="zero2", model="lora", clip=0.01, accumulate=3),
    Case(engine="zero2", model="tied"),
    Case(engine="zero2", optimizer="sgd"),
    Case(engine="zero2", bits="bf16", clip=0.1, accumulate=3),
    Case(engine="zero2", bits="fp16", clip=0.1),
    Case(engine="zero2-offload", accumulate=3, clip=0.1),
]
SHARDED = [
    Case(engine="zero3", accumulate=3, clip=0.1),
    Case(engine="zero3", model="lora", clip=0.01),
    Case(engine="zero3", optimizer="sgd"),
    Case(engine="zero3", bits="bf16", clip=0.1),
    Case(engine="zero3", bits="fp16", clip=0.1),
    Case(engine="zero3-offload", accumulate=3, clip=0.1),
    Case(engine="zero3-offload-all", accumulate=2, clip=0.1),
    Case(engine="fsdp2"),
    Case(engine="fsdp2", accumulate=3, clip=0.1),
    Case(engine="fsdp2", model="lora"),
    Case(engine="fsdp2-offload", clip=0.1),
]
THREE = [
    Case(engine="ddp", accumulate=3),
    Case(engine="zero1", model="lora"),
    Case(engine="zero2", accumulate=3, clip=0.1),
    Case(engine="zero3", clip=0.1),
    Case(engine="fsdp2", accumulate=2),
]
FOUR = [
    Case(engine="hsdp", accumulate=2, clip=0.1),
    Case(engine="zero3-offload", model="lora"),
]
WORLDS = {"two": (TWO, 2), "sharded": (SHARDED, 2), "three": (THREE, 3), "four": (FOUR, 4)}


def world_of(name: str) -> Any:
    """Returns a fixture with what every rank of a world found for all its cases."""

    @pytest.fixture(scope="module", name=name)
    def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
        cases, size = WORLDS[name]
        return errors_of(cases, size, tmp_path_factory.mktemp(name), 240)

    return found


two, sharded, three, four = (world_of(name) for name in WORLDS)


@pytest.mark.parametrize("case", ONE, ids=lambda c: c.label)
def test_metrics_of_a_plain_loop_equal_float64(case: Case, tmp_path: Path) -> None:
    assert_exact(run_cases([vars(case)], str(tmp_path)), case)


@pytest.mark.parametrize("case", TWO, ids=lambda c: c.label)
def test_metrics_on_two_ranks_equal_one_process_in_float64(two: list[dict], case: Case) -> None:
    assert_exact(two[0], case)


@pytest.mark.parametrize("case", SHARDED, ids=lambda c: c.label)
def test_metrics_of_sharded_parameters_equal_float64(sharded: list[dict], case: Case) -> None:
    assert_exact(sharded[0], case)


@pytest.mark.parametrize("case", THREE, ids=lambda c: c.label)
def test_metrics_on_three_ranks_equal_one_process_in_float64(three: list[dict], case: Case) -> None:
    assert_exact(three[0], case)


@pytest.mark.parametrize("case", FOUR, ids=lambda c: c.label)
def test_metrics_on_four_ranks_equal_one_process_in_float64(four: list[dict], case: Case) -> None:
    assert_exact(four[0], case)


@pytest.mark.full
def test_metrics_under_deepspeeds_cpu_adam_equal_float64(tmp_path: Path) -> None:
    """DeepSpeed compiles this optimizer first."""
    cases = [Case(engine=e, optimizer="cpu_adam") for e in ("zero2-offload", "zero3-offload")]
    results = errors_of(cases, 2, tmp_path, 280)
    for case in cases:
        assert_exact(results[0], case)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_the_cases_split_one_parameter_and_leave_a_rank_without_another(
    three: list[dict], engine: str
) -> None:
    """Without that, the tests above would miss what they are for."""
    label = next(case.label for case in THREE if case.engine == engine)
    held = [result[label]["held"] for result in three]
    holders: dict[int, list[int]] = {}
    for rank, shards in enumerate(held):
        for index, _, numel in shards:
            assert numel > 0
            holders.setdefault(index, []).append(rank)
    assert any(len(ranks) > 1 for ranks in holders.values())
    assert any(len(ranks) < 3 for ranks in holders.values())
    assert any(offset > 0 for shards in held for _, offset, _ in shards)


@pytest.mark.parametrize(
    ("world", "engine", "name"),
    [
        ("two", "ddp", "ddp"),
        ("two", "zero0", "deepspeed-zero0"),
        ("two", "zero2-offload", "deepspeed-zero2-offload"),
        ("sharded", "zero3", "deepspeed-zero3"),
        ("sharded", "fsdp2", "fsdp2"),
        ("four", "hsdp", "hsdp2"),
    ],
)
def test_the_engine_is_detected(
    request: pytest.FixtureRequest, world: str, engine: str, name: str
) -> None:
    label = next(case.label for case in WORLDS[world][0] if case.engine == engine)
    assert {result[label]["name"] for result in request.getfixturevalue(world)} == {name}


def test_the_clipped_cases_really_clip(tmp_path: Path) -> None:
    """So norms that pass the tests above were read before clipping."""
    case = Case(engine="plain", clip=0.1)
    records, *_ = train(case, str(tmp_path), 0, 1)
    assert all(record["grad/norm/total"] > 2 * case.clip for record in records)

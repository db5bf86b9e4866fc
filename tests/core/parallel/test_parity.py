"""Every stage of `ulysses train`, split over ranks, equals one process: docs/parity.md.

In float64: the first loss to 1e-9, the first gradients and the weights after two SGD steps to 1e-6
relative to each parameter's norm, and every number that the trainer logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from tests.support.parity_cases import ENGINES, KINDS, ParityCase, train_all, write_rows
from tests.support.parity_page import (
    BOUNDS,
    SIZES,
    Errors,
    all_cases,
    measure,
    read_page,
    write_page,
)
from tests.support.spawn import spawn
from ulysses_core.trainers.stage import list_stages

CASES = [
    *(
        ParityCase(kind=kind, engine=ENGINES[i % 4], adapters=i % 2 == 0)
        for i, kind in enumerate(KINDS)
    ),
    ParityCase(kind="sft-packed", engine="fsdp2", size=3),
    ParityCase(kind="rm", engine="zero2", size=3, adapters=True),
    ParityCase(kind="dpo", engine="zero3", size=4),
    ParityCase(kind="ppo", engine="fsdp2", adapters=True),
]


def train(cases: Sequence[ParityCase], folder: Path) -> dict[str, Errors]:
    """Trains the cases and each alone; returns the worst errors over ranks by the case's label."""
    alone = {case.alone.label: case.alone for case in cases}
    truth = spawn_cases(list(alone.values()), 1, folder)[0]
    errors: dict[str, Errors] = {}
    for size in SIZES:
        chosen = [case for case in cases if case.size == size]
        for some in (chosen[i : i + 18] for i in range(0, len(chosen), 18)):
            ranks = spawn_cases(some, size, folder)
            errors |= {c.label: worst_of(c, truth, ranks) for c in some}
    return errors


def spawn_cases(cases: list[ParityCase], ranks: int, folder: Path) -> list[dict[str, Any]]:
    if not cases:
        return []
    return spawn(train_all, ranks, args=[[vars(c) for c in cases], str(folder)], timeout=500)


def worst_of(case: ParityCase, truth: dict[str, Any], ranks: list[dict[str, Any]]) -> Errors:
    for result in (truth[case.alone.label], *(rank[case.label] for rank in ranks)):
        assert "error" not in result, f"{case.label}: {result['error']}"
    assert {rank[case.label]["engine"] for rank in ranks} == {case.engine}
    each = [measure(truth[case.alone.label], rank[case.label]) for rank in ranks]
    return Errors(*(max(values) for values in zip(*map(astuple, each), strict=True)))


def assert_equal(label: str, errors: Errors) -> None:
    for name, bound in vars(BOUNDS).items():
        assert getattr(errors, name) <= bound, f"{label}: {name}: {getattr(errors, name)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("parity")
    write_rows(made)
    return made


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Errors]:
    return train(CASES, folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_a_stage_equals_one_process(trained: dict[str, Errors], case: ParityCase) -> None:
    assert_equal(case.label, trained[case.label])


def test_every_stage_is_in_the_table_and_equal() -> None:
    assert {keys["stage"] for keys in KINDS.values()} == set(list_stages())
    page = read_page()
    assert page.keys() == {case.label for case in all_cases()}
    for label, errors in page.items():
        assert_equal(label, Errors(*errors))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_all_cases_of_the_table_equal_one_process(folder: Path) -> None:
    errors = train(all_cases(), folder)
    write_page(errors)
    for label, each in errors.items():
        assert_equal(label, each)

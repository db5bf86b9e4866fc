"""A stage that is stopped and resumed ends with the weights of one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.parity_cases import ParityCase, write_rows
from tests.support.resume_cases import STEPS, train_part
from tests.support.spawn import spawn

CASES = [
    ParityCase(kind="rm", engine="zero2"),
    ParityCase(kind="dpo", engine="ddp", adapters=True),
    ParityCase(kind="kto", engine="zero3"),
    ParityCase(kind="grpo", engine="ddp", adapters=True),
    ParityCase(kind="ppo", engine="zero2"),
    ParityCase(kind="ppo", engine="zero3", adapters=True),
]
MORE = [
    ParityCase(kind=kind, engine=engine, adapters=adapters)
    for kind in ("rm", "dpo", "dpo-orpo", "dpo-simpo", "kto", "grpo", "ppo")
    for engine in ("ddp", "zero2", "zero3")
    for adapters in (False, True)
]
BOUND = 1e-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    write_rows(made)
    return made


def assert_resumes(case: ParityCase, folder: Path, tmp_path: Path) -> None:
    def train(part: str, output: str) -> list[dict[str, Any]]:
        args = [vars(case), str(folder), str(tmp_path / output), part]
        return spawn(train_part, case.size, args=args, timeout=120)

    straight = train("all", "straight")
    assert train("before", "broken")[0]["step"] == 3
    for result, truth in zip(train("after", "broken"), straight, strict=True):
        assert result["step"] == STEPS
        for name, weight in truth["weights"].items():
            error = float((result["weights"][name] - weight).norm() / weight.norm().clamp(1e-12))
            assert error <= BOUND, f"{case.label}: {name}: relative error {error}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_a_stage_resumes(case: ParityCase, folder: Path, tmp_path: Path) -> None:
    assert_resumes(case, folder, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", MORE, ids=lambda c: c.label)
def test_a_stage_resumes_under_every_engine(case: ParityCase, folder: Path, tmp_path: Path) -> None:
    assert_resumes(case, folder, tmp_path)

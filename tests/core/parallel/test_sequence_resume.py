"""A checkpoint can be resumed on another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.sequence_cases import Case, build_trainer, weights_of
from tests.support.spawn import spawn

STEPS = 4


def train(folder: str, until: int, resume: bool) -> dict[str, Any]:
    import ulysses_core as uc

    trainer = build_trainer(
        Case(), output_dir=folder, max_steps=until, save_strategy="steps", save_steps=2
    )
    uc.sequence_parallel(trainer, dist.get_world_size() if dist.is_initialized() else 1)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    return {"losses": losses, "weights": weights_of(trainer.model)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("straight"))
    return spawn(train, 1, args=[folder, STEPS, False], timeout=60)[0]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 4)])
def test_training_resumes_on_another_number_of_processes(
    straight: dict[str, Any], tmp_path: Path, first: int, then: int
) -> None:
    spawn(train, first, args=[str(tmp_path), 2, False], timeout=90)
    for result in spawn(train, then, args=[str(tmp_path), STEPS, True], timeout=90):
        assert result["losses"] == pytest.approx(straight["losses"], rel=1e-5)
        for name, weight in straight["weights"].items():
            error = float((result["weights"][name] - weight).norm() / weight.norm())
            assert error <= 1e-12, f"{name}: relative error {error}"

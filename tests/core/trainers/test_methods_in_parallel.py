"""DFT's loss, LoRA+ and initialisations from rows on ranks that share rows, against one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.core.cli.conftest import CONFIG
from tests.core.cli.conftest import make_world as make_world
from tests.support.spawn import spawn

STEPS = {
    "max_steps": 3,
    "logging_steps": 1,
    "val_size": 0,
    "monitor": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
}
METHODS: dict[str, dict[str, Any]] = {
    "dft": {"use_dft_loss": True},
    "dft-lora": {"use_dft_loss": True, "finetuning_type": "lora", "loraplus_lr_ratio": 4.0},
    **{
        name: {"finetuning_type": "lora", "lora_rank": 4, "lora_init": name, "lora_init_rows": 16}
        for name in ("eva", "corda", "lora_ga")
    },
}


def train(folder: str, name: str, values: dict[str, Any]) -> list[tuple[float, float]]:
    """The child: loss and gradient norm of each step."""
    os.chdir(folder)
    from ulysses_core.trainers import UlyssesTrainingManager

    path = Path(f"{name}-{os.environ.get('RANK', 0)}.yaml")
    path.write_text(yaml.safe_dump({**CONFIG, **STEPS, **values, "output_dir": f"runs/{name}"}))
    with UlyssesTrainingManager(path) as manager:
        manager.run_training()
        assert manager.trainer is not None
        logged = manager.trainer.state.log_history
    return [(entry["loss"], float(entry["grad_norm"])) for entry in logged if "loss" in entry]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "deepspeed"),
    [
        ("dft", None),
        pytest.param("dft", "zero3", marks=pytest.mark.full),
        ("dft-lora", "zero2"),
        ("lora_ga", "zero2"),
        pytest.param("eva", None, marks=pytest.mark.full),
        pytest.param("corda", "zero2", marks=pytest.mark.full),
    ],
)
def test_two_ranks_that_share_rows_train_as_one(
    make_world: Any, method: str, deepspeed: str | None
) -> None:
    folder = str(make_world().path)
    plain = {"deepspeed": None, "sequence_parallel_size": 1, **METHODS[method]}
    shared = {"deepspeed": deepspeed, "sequence_parallel_size": 2, **METHODS[method]}
    (one,) = spawn(train, 1, args=[folder, "one", plain])
    for found in spawn(train, 2, args=[folder, "two", shared]):
        assert len(found) == len(one) == 3
        for (loss, norm), (its_loss, its_norm) in zip(found, one, strict=True):
            assert loss == pytest.approx(its_loss, rel=1e-4)
            assert norm == pytest.approx(its_norm, rel=1e-3)

"""transformers: a Trainer, and a script in the style of its examples with `Seq2SeqTrainer`."""

from __future__ import annotations

import pytest

from tests.clients.case import RUN, Case, Client
from tests.clients.conftest import Check
from tests.clients.programs import read_program

CLIENT = Client(
    "transformers", packages=("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0")
)
SETTINGS = {
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_steps": 6,
    "predict_with_generate": True,
    "generation_max_length": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 3,
}
WORDS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
CASES = [
    Case(
        CLIENT,
        "Trainer, attached by hand",
        command=("python", "train_trainer.py"),
        watched=("python", "train_trainer.py", RUN),
        files=read_program("train_trainer.py"),
    ),
    Case(
        CLIENT,
        "summarization, T5, full",
        command=("python", "run_summarization.py", *WORDS),
        files=read_program("run_summarization.py"),
    ),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_with_transformers_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

"""accelerate: `accelerate launch` on two processes, with a Trainer and with a loop of one's own."""

from __future__ import annotations

import pytest

from tests.clients.case import RUN, Case, Client
from tests.clients.conftest import Check
from tests.clients.programs import read_log, read_program

CLIENT = Client("accelerate", packages=("accelerate==1.15.0", "transformers==5.23.0"))
# Without a GPU, `--cpu` starts one process only, or several by MPI; the programs ask for the CPU.
LAUNCH = (
    *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0"),  # any free one
)

CASES = [
    Case(
        CLIENT,
        "Trainer, 2 processes",
        command=(*LAUNCH, "train_trainer.py"),
        files=read_program("train_trainer.py"),
    ),
    Case(
        CLIENT,
        "loop, 2 processes",
        command=(*LAUNCH, "loop_accelerate.py"),
        watched=(*LAUNCH, "loop_accelerate.py", RUN),
        files=read_program("loop_accelerate.py"),
        read=read_log,
        weights=("weights.pt",),
    ),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_that_accelerate_launches_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

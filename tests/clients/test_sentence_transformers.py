"""sentence-transformers: its Trainer, under `ulysses attach`."""

from __future__ import annotations

import pytest

from tests.clients.case import Case, Client
from tests.clients.conftest import Check
from tests.clients.programs import read_program

CLIENT = Client(
    "sentence-transformers",
    packages=("sentence-transformers[train]==6.2.0", "transformers==5.23.0"),
)
CASES = [
    Case(
        CLIENT,
        "embeddings, full",
        command=("python", "train_embeddings.py"),
        files=read_program("train_embeddings.py"),
    )
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_with_sentence_transformers_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)

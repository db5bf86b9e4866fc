"""The preference stages learn a taste that can be seen on rows held out, with every seed.

The table in docs/training.md is what `pytest -s` prints here.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import pytest

from tests.support.learn_cases import KINDS, learn, write_taste
from tests.support.spawn import spawn

SEEDS = [1, 2, 3]
LEAST = {"rm": 0.9, "dpo": 0.1, "dpo-orpo": 0.05, "dpo-simpo": 0.1, "kto": 0.1}
"""What each seed must reach; a model that learnt nothing has 0.5 (rm) or about 0."""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    folder: Path = tmp_path_factory.mktemp("taste")
    write_taste(folder)
    found = spawn(learn, 1, args=[str(folder), SEEDS], timeout=280)[0]
    for kind, pairs in found.items():
        before, after = zip(*pairs, strict=True)
        print(kind, *(f"{mean(v):.2f} ± {stdev(v):.2f}" for v in (before, after)))  # noqa: T201
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_preference_stage_learns_with_every_seed(
    numbers: dict[str, list[list[float]]], kind: str
) -> None:
    for before, after in numbers[kind]:
        assert after >= LEAST[kind] > before
    # The smallest gain is beyond the spread over seeds.
    gains = [after - before for before, after in numbers[kind]]
    assert mean(gains) > 2 * stdev(gains)

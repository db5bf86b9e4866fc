"""TRL's trainers with sequence parallelism against one process: SFT, DPO, KTO, Reward, GRPO, RLOO.

In float64, weights are compared after two SGD steps, for each parameter relative to its norm, and
so is every number that the trainers log.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.spawn import spawn
from tests.support.stage_cases import SAMPLING, StageCase, build_stage_model, train_stages

STAGES = ("sft", "rm", "dpo", "kto")
CASES = [
    *(StageCase(stage=s) for s in STAGES),
    *(StageCase(stage=s, zero=2, adapters=True) for s in STAGES),
    *(StageCase(stage=s, zero=3) for s in STAGES),
    StageCase(stage="dpo", heads=3, key_heads=3, accumulate=2, rows=2),
    StageCase(stage="dpo", size=3, heads=12, key_heads=3),
    StageCase(stage="rm", size=3, heads=12, key_heads=3),
    StageCase(stage="sft", size=4, heads=12, key_heads=3),
    StageCase(stage="kto", size=4, heads=12, key_heads=3),
    StageCase(stage="dpo", size=2, groups=2, rows=2, zero=3, adapters=True),
    StageCase(stage="grpo", settings=(("num_iterations", 2),)),
    StageCase(stage="grpo", zero=3, adapters=True),
    StageCase(stage="grpo", rows=2, accumulate=2, zero=2),
    StageCase(stage="rloo", adapters=True),
    StageCase(stage="ppo", zero=3),
    StageCase(stage="ppo", zero=2, adapters=True),
    StageCase(stage="ppo", rows=2, accumulate=2),
]
MORE = [
    *(StageCase(stage=s, adapters=True, zero=z) for s in STAGES for z in (None, 3)),
    *(StageCase(stage=s, zero=2) for s in STAGES),
    *(
        StageCase(stage=s, size=n, heads=12, key_heads=3, adapters=n == 2)
        for s in STAGES
        for n in (2, 3, 4)
    ),
    *(StageCase(stage=s, size=2, groups=2, rows=2) for s in STAGES if s != "kto"),
    StageCase(stage="dpo", settings=(("loss_type", ("ipo",)), ("ld_alpha", 0.5))),
    StageCase(stage="kto", settings=(("loss_type", "apo_zero_unpaired"),), heads=3, key_heads=1),
    StageCase(stage="sft", settings=(("loss_type", "dft"),)),
    *(
        StageCase(stage=s, adapters=a, zero=z)
        for s in SAMPLING
        for a in (False, True)
        for z in (None, 2, 3)
    ),
    *(
        StageCase(stage=s, size=n, heads=12, key_heads=3, adapters=n == 3, zero=3)
        for s in SAMPLING
        for n in (2, 3, 4)
    ),
    *(
        StageCase(stage=s, groups=2, rows=r, zero=z, replays=True)
        for s in SAMPLING
        for r, z in ((2, None), (1, 3))
    ),
    *(
        StageCase(
            stage="grpo", settings=(("loss_type", kind), ("mask_truncated_completions", True))
        )
        for kind in ("grpo", "dr_grpo", "cispo")
    ),
]
BOUND = 1e-6
"""TRL computes log-probabilities in float32, and ZeRO keeps its master weights in it."""


def train_all(cases: list[StageCase]) -> dict[str, list[dict[str, Any]]]:
    """Trains every case alone and in parallel; returns the ranks' results by the case's label."""
    found: dict[str, list[dict[str, Any]]] = {}
    unique = {case.alone.label: case.alone for case in cases}
    by_ranks: dict[int, list[StageCase]] = {1: list(unique.values())}
    for case in cases:
        by_ranks.setdefault(case.size * case.groups, []).append(case)
    for ranks, group in by_ranks.items():
        results = spawn(train_stages, ranks, args=[[vars(case) for case in group]], timeout=400)
        found |= {case.label: [each[case.label] for each in results] for case in group}
    return found


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    return train_all(CASES)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_a_trainer_of_trl_equals_one_process(
    trained: dict[str, list[dict[str, Any]]], case: StageCase
) -> None:
    assert_same_training(trained, case)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_more_trainings_equal_one_process() -> None:
    trained = train_all(MORE)
    for case in MORE:
        assert_same_training(trained, case)


def assert_same_training(trained: dict[str, list[dict[str, Any]]], case: StageCase) -> None:
    (truth,) = trained[case.alone.label]
    assert "error" not in truth, truth["error"]
    for result in trained[case.label]:
        assert "error" not in result, result["error"]
        for name, weight in truth["weights"].items():
            error = float((result["weights"][name] - weight).norm() / weight.norm().clamp(1e-12))
            assert error <= BOUND, f"{case.label}: {name}: relative error {error}"
        assert len(result["logged"]) == len(truth["logged"]) == 2
        for found, expected in zip(result["logged"], truth["logged"], strict=True):
            # Rewards are small differences of sums of about 30 in float32.
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), case.label
        assert evaluated(result, case) == pytest.approx(
            evaluated(truth, case), rel=1e-5, abs=1e-5
        ), case.label
    assert max(moved(truth["weights"], case)) > 1e-4  # otherwise there is nothing to compare


def evaluated(result: dict[str, Any], case: StageCase) -> dict[str, float]:
    """Returns what an evaluation measured.

    TRL weighs what it counts by token by the tokens of all groups' batches. With several groups
    these are more than one process's batch, as without sequence parallelism.
    """
    by_token = ("logits", "accuracy", "entropy") if case.groups > 1 else ()
    return {k: v for k, v in result["eval"].items() if not any(word in k for word in by_token)}


def moved(weights: dict[str, Any], case: StageCase) -> list[float]:
    """Returns how far each weight is from its start, relative to its norm; adapters are new."""
    start = build_stage_model(case).state_dict()
    if case.adapters:
        return [float(w.norm()) for n, w in weights.items() if "lora_B" in n]
    kept = {name: w for name, w in weights.items() if name in start}  # not a value head
    return [float((w - start[name]).norm() / w.norm()) for name, w in kept.items()]

"""TRL's ORPO and CPO trainers with sequence parallelism against the same on one process.

With 12 query and 3 key/value heads, in float64: the first loss to 1e-9, the first gradients and the
weights after two SGD steps to 1e-6 relative to each parameter's norm, and every number logged.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.forget import forget_last_trainer
from tests.support.parity_cases import train_watched
from tests.support.parity_page import BOUNDS, measure
from tests.support.spawn import spawn
from tests.support.stage_cases import StageCase, build_stage_trainer
from ulysses_core.parallel.families.proof import Float64

LOSSES: dict[str, dict[str, Any]] = {
    "orpo": {"beta": 0.3},
    "sigmoid": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "without-nll": {"loss_type": "sigmoid", "cpo_alpha": 0.0},
    "hinge": {"loss_type": "hinge", "cpo_alpha": 0.5},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.7, "simpo_gamma": 0.3},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.25},
}
"""Settings of TRL's trainers; the first is of ORPO, all others of CPO."""


def make(loss: str, size: int = 2, **more: Any) -> StageCase:
    stage = "orpo" if loss == "orpo" else "cpo"
    settings = tuple(LOSSES[loss].items())
    heads = {"heads": 12, "key_heads": 3}
    return StageCase(stage=stage, size=size, settings=settings, **heads | more)


CASES = [
    make("orpo"),
    make("orpo", zero=2, adapters=True),
    make("sigmoid", zero=2),
    make("hinge", adapters=True),
    make("ipo"),
    make("simpo", accumulate=2, rows=2),
    make("alphapo", adapters=True),
]
MORE = [
    *(
        make(loss, size=size, zero=zero, adapters=adapters)
        for loss in LOSSES
        for size in (2, 3, 4)
        for zero in (None, 2, 3)
        for adapters in (False, True)
    ),
    *(make("without-nll", groups=2, rows=2, zero=z, adapters=z is None) for z in (None, 2, 3)),
]


def train_all(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The child: every case in turn; a case that fails on all ranks does not stop the others."""
    results = {}
    compute_backward_in_float64()
    for settings in cases:
        case = StageCase(**settings)
        try:
            trainer = build_stage_trainer(case)
            found = train_watched(trainer, size=case.size, engine="")
            found["eval"] = {k: v for k, v in trainer.evaluate().items() if is_measured(k)}
            results[case.label] = found
        except Exception:  # noqa: BLE001 - the test of this case reports it
            results[case.label] = {"error": traceback.format_exc()}
        forget_last_trainer()
    return results


def compute_backward_in_float64() -> None:
    """Extends `Float64` to the backward pass of TRL's fused head, which torch runs without it.

    One process computes these losses from logits, in float64, so the rounding would not cancel.
    """
    from trl.kernels import ChunkedLogProbFunction

    backward = ChunkedLogProbFunction.backward

    def widened(*args: Any) -> Any:
        with Float64():
            return backward(*args)

    ChunkedLogProbFunction.backward = staticmethod(widened)


def is_measured(name: str) -> bool:
    return not any(word in name for word in ("runtime", "second", "epoch"))


def train(cases: Sequence[StageCase]) -> dict[str, list[dict[str, Any]]]:
    """Trains every case alone and in parallel; returns the ranks' results by the case's label."""
    found: dict[str, list[dict[str, Any]]] = {}
    by_ranks = {1: list({case.alone.label: case.alone for case in cases}.values())}
    for case in cases:
        by_ranks.setdefault(case.size * case.groups, []).append(case)
    for ranks, group in by_ranks.items():
        for some in (group[i : i + 14] for i in range(0, len(group), 14)):
            results = spawn(train_all, ranks, args=[[vars(c) for c in some]], timeout=500)
            found |= {case.label: [each[case.label] for each in results] for case in some}
    return found


def assert_equal(trained: dict[str, list[dict[str, Any]]], case: StageCase) -> None:
    (truth,) = trained[case.alone.label]
    for result in (truth, *trained[case.label]):
        assert "error" not in result, result["error"]
    norms = [float(gradient.norm()) for gradient in truth["gradients"].values()]
    assert max(norms) > 0.01  # otherwise the weights stay, and there is nothing to compare
    logged = [without_logits(entry) for entry in truth["logged"]]
    engine = "ddp" if case.zero is None else f"zero{case.zero}"
    for result in trained[case.label]:
        assert result["engine"] == engine
        # Means over the logits of whole rows and of their padding: absent, not wrong.
        assert all(not name.startswith("logits/") for entry in result["logged"] for name in entry)
        if case.groups > 1:  # each group has its own rows; the loss that counts is their mean
            result["losses"] = truth["losses"]
        errors = measure(truth | {"logged": logged}, result)
        for name, bound in vars(BOUNDS).items():
            assert getattr(errors, name) <= bound, f"{case.label}: {name}: {getattr(errors, name)}"
        assert result["eval"] == pytest.approx(without_logits(truth["eval"]), rel=1e-6, abs=1e-6)


def without_logits(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if "logits/" not in name}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    return train(CASES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_a_trainer_of_pairs_equals_one_process(
    trained: dict[str, list[dict[str, Any]]], case: StageCase
) -> None:
    assert_equal(trained, case)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_more_trainers_of_pairs_equal_one_process() -> None:
    trained = train(MORE)
    for case in MORE:
        assert_equal(trained, case)

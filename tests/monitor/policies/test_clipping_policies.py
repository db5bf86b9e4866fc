"""Clipping policies against their papers' formulas, reimplemented with NumPy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.monitor.policies.policy_records import (
    LOSS,
    MEAN,
    NORM,
    OWN_NORM,
    acting_steps,
    asked,
    near,
    record,
    series,
    values_of,
)
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.clipping import AutoClip, ThresholdClipping, ZClip
from ulysses_monitor.policies.tensor_clipping import AGC, AdaGC
from ulysses_monitor.records import Action

Array = npt.NDArray[np.float64]


def norms(seed: int = 0, count: int = 300) -> Array:
    """Makes norms that are log-normal, falling, with spikes."""
    rng = np.random.default_rng(seed)
    found = np.exp(0.3 * rng.standard_normal(count)) * np.linspace(3.0, 1.0, count)
    found[rng.integers(0, count, 12)] *= 20.0
    return np.asarray(found)


def limits(policy: Any, values: Array) -> list[float | None]:
    """Returns the norm that each step is clipped to; None if it is not clipped."""
    found: list[float | None] = []
    for actions in asked(policy, series(NORM, values)):
        assert [action.kind for action in actions] in ([], ["clip_norm"])
        found.append(actions[0].values["max_norm"] if actions else None)
    return found


def assert_alike(
    found: list[float | None], expected: list[float | None], rel: float = 1e-12
) -> None:
    assert [f is None for f in found] == [e is None for e in expected]
    for one, other in zip(found, expected, strict=True):
        assert one is None or one == pytest.approx(other, rel=rel, abs=0.0)


# -- a threshold ------------------------------------------------------------------------------


def test_threshold_clipping_acts_above_its_threshold_until_four_fifths_of_it() -> None:
    values = [5.0, 5.001, 4.5, 4.001, 4.0, 4.5, math.inf, math.nan, 4.5, 1.0]
    policy = ThresholdClipping()
    found = asked(policy, series(MEAN, values))
    assert [i for i, actions in enumerate(found, 1) if actions] == [2, 3, 4, 7, 9]
    assert found[1] == [
        Action(
            kind="clip_norm",
            values={"max_norm": 1.0},
            reason=f"{MEAN} is above 5",
            read={MEAN: 5.001},
        )
    ]


def test_threshold_clipping_never_pauses() -> None:
    assert len(acting_steps(ThresholdClipping(), series(MEAN, [6.0] * 1000))) == 1000
    assert len(acting_steps(ThresholdClipping(most=7), series(MEAN, [6.0] * 1000))) == 7


# -- AutoClip ---------------------------------------------------------------------------------


def autoclip(values: Array, percentile: float, window: int, warmup: int) -> Iterator[float | None]:
    """arXiv:2007.14469, algorithm 1: the norm joins the history before its percentile is taken."""
    for i, norm in enumerate(values):
        most = float(np.percentile(values[max(0, i + 1 - window) : i + 1], percentile))
        yield most if i >= warmup and norm > most else None


@pytest.mark.parametrize(
    ("percentile", "window", "warmup"),
    [(10.0, 10_000, 10), (10.0, 50, 10), (50.0, 300, 0), (99.0, 40, 39), (33.3, 2, 1)],
)
def test_autoclip_clips_to_the_percentile_of_the_norms_so_far(
    percentile: float, window: int, warmup: int
) -> None:
    policy = AutoClip(percentile=percentile, window=window, warmup=warmup)
    assert policy.steps_before_acting == warmup
    expected = list(autoclip(norms(), percentile, window, warmup))
    assert 1 < sum(most is not None for most in expected) < 300
    assert_alike(limits(policy, norms()), expected)


def test_autoclip_clips_nine_steps_of_ten() -> None:
    steady = np.random.default_rng(0).permutation(1000).astype(float) + 1
    clipped = sum(most is not None for most in limits(AutoClip(), steady))
    assert clipped == pytest.approx(0.9 * 990, rel=0.02)


def test_autoclip_says_what_it_read() -> None:
    *_, (action,) = asked(AutoClip(), series(NORM, [1.0] * 10 + [3.0]))
    assert action.values == near({"max_norm": 1.0})
    assert (action.read, action.reason) == ({NORM: 3.0}, "above the 10th percentile of norms")


def test_autoclip_forgets_norms_beyond_its_window() -> None:
    policy, smaller = AutoClip(), AutoClip(window=20)
    limits(policy, norms()[:100])
    smaller.load_state_dict(policy.state_dict())
    found = limits(smaller, norms()[100:])
    assert_alike(found, list(autoclip(norms(), 10.0, 20, 10))[100:])
    assert {len(held) for held in smaller.memory.values()} == {20}


# -- ZClip ------------------------------------------------------------------------------------


def zclip(values: Array, alpha: float, z: float, warmup: int, eps: float) -> Iterator[float | None]:
    """arXiv:2504.02507, with the mean moved before the variance, as in the authors' code."""
    mean, variance = float(values[:warmup].mean()), float(values[:warmup].var())
    yield from [None] * warmup
    for norm in values[warmup:]:
        std = math.sqrt(variance)
        score = (norm - mean) / (std + eps * mean)
        spike = score > z
        entering = mean + z * std / (score / z) if spike else float(norm)
        yield entering if spike else None
        mean = alpha * mean + (1 - alpha) * entering
        variance = alpha * variance + (1 - alpha) * (entering - mean) ** 2


@pytest.mark.parametrize(("eps", "rel"), [(1e-6, 1e-12), (0.0, 1e-4)])
@pytest.mark.parametrize(("alpha", "z", "warmup"), [(0.97, 2.5, 25), (0.9, 1.5, 2), (0.5, 4, 100)])
def test_zclip_clips_to_the_reciprocal_of_the_score_as_in_the_paper(
    alpha: float, z: float, warmup: int, eps: float, rel: float
) -> None:
    """The paper's formula has no 1e-6; the authors' code does."""
    policy = ZClip(alpha=alpha, z=z, warmup=warmup)
    assert policy.steps_before_acting == warmup
    expected = list(zclip(norms(), alpha, z, warmup, eps))
    assert any(most is not None for most in expected)
    assert_alike(limits(policy, norms()), expected, rel)


def test_zclips_first_step_after_the_warm_up_matches_a_hand_calculation() -> None:
    """Norms of 1 and 3 have mean 2 and deviation 1; 7 is 5 deviations above: 2 + 2.5**2 / 5."""
    found = limits(ZClip(warmup=4), np.array([1.0, 3.0, 1.0, 3.0, 7.0]))
    assert found[:4] == [None] * 4
    assert found[4] == pytest.approx(3.25, rel=1e-5)
    edge = limits(ZClip(warmup=4), np.array([1.0, 3.0, 1.0, 3.0, 4.5]))
    assert edge[4] is None


# -- AdaGC ------------------------------------------------------------------------------------


def adagc(
    values: Array, relative: float, beta: float, absolute: float, warmup: int
) -> Iterator[tuple[float | None, dict[int, float]]]:
    """arXiv:2502.11034, algorithm 1: the common limit and the limits of single tensors."""
    gamma = np.full(values.shape[1], np.inf)
    for t, own in enumerate(values, 1):
        if t <= warmup:
            total = math.sqrt(float((own**2).sum()))
            gamma = np.minimum(gamma, own * min(1.0, absolute / total))
            yield (absolute if total > absolute else None), {}
        else:
            factors = np.minimum(1.0, relative * gamma / own)
            yield None, {i: float(own[i] * factors[i]) for i in np.flatnonzero(factors < 1.0)}
            gamma = beta * gamma + (1 - beta) * own * factors


def tensors(step: int, own: Any) -> Any:
    metrics = {f"{OWN_NORM}t{i}": float(norm) for i, norm in enumerate(own)}
    return record(step, metrics | {NORM: float(np.sqrt(np.square(own).sum()))})


@pytest.mark.parametrize(
    ("relative", "beta", "absolute", "warmup"),
    [(1.05, 0.98, 1.0, 100), (2.0, 0.5, 100.0, 1), (1.0, 0.9, 0.1, 250)],
)
def test_adagc_clips_each_tensor_by_its_own_moving_average(
    relative: float, beta: float, absolute: float, warmup: int
) -> None:
    values = np.stack([norms(seed) for seed in range(5)], axis=1) * [0.1, 0.2, 0.3, 0.4, 0.01]
    policy = AdaGC(relative=relative, beta=beta, absolute=absolute, warmup=warmup)
    found = asked(policy, [tensors(t, own) for t, own in enumerate(values, 1)])
    expected = list(adagc(values, relative, beta, absolute, warmup))
    single = 0
    for actions, (common, each) in zip(found, expected, strict=True):
        wanted = [("clip_norm", {"max_norm": common})] if common is not None else []
        wanted += [("clip_each", near({f"t{i}": v for i, v in each.items()}))] if each else []
        assert values_of(actions) == wanted
        single += len(each)
        if each:
            assert actions[0].targets == tuple(f"t{i}" for i in each)
            assert list(actions[0].read) == [f"{OWN_NORM}t{i}" for i in each][:3]
    assert single > 30


def test_adagc_does_not_hold_a_tensor_at_a_first_gradient_of_zero() -> None:
    policy = AdaGC(warmup=2)
    rows = [[0.5, 0.0], [0.4, 0.0], [0.4, 0.7], [0.5, 0.7], [0.4, 0.8], [0.4, 0.0], [0.4, 0.8]]
    found = [values_of(a) for a in asked(policy, [tensors(i, r) for i, r in enumerate(rows, 1)])]
    moved = 0.98 * 0.7 + 0.02 * 1.05 * 0.7
    assert found == [
        *([], [], []),
        [("clip_each", near({"t0": 1.05 * 0.4}))],
        [("clip_each", near({"t1": 1.05 * 0.7}))],
        [],
        [("clip_each", near({"t1": 1.05 * moved}))],
    ]


def test_adagcs_warm_up_clips_only_above_the_common_norm() -> None:
    rows = [tensors(1, [0.6, 0.8]), tensors(2, [0.6, 0.81])]
    assert acting_steps(AdaGC(), rows, "clip_norm") == [2]


@pytest.mark.parametrize("others", [("t0", "new"), ("t0", "t1", "t2")])
def test_adagc_starts_over_if_other_parameters_are_trained(others: tuple[str, ...]) -> None:
    policy = AdaGC(warmup=2, absolute=0.1)
    assert acting_steps(policy, [tensors(i, [0.5, 0.5]) for i in range(1, 4)], "clip_norm") == [
        1,
        2,
    ]
    later = {NORM: 1.0} | {f"{OWN_NORM}{name}": 0.5 for name in others}
    records = [record(i, later) for i in range(4, 8)]
    assert acting_steps(policy, records, "clip_norm") == [4, 5]


# -- what says nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [AutoClip(warmup=2), ZClip(warmup=2), AdaGC(warmup=2)])
@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf, None])
def test_an_unusable_norm_is_neither_clipped_nor_remembered(
    policy: Any, norm: float | None
) -> None:
    known = [tensors(i, [1.0 + 0.1 * (i % 2), 0.2]) for i in range(1, 9)]
    odd = record(9, {LOSS: 1.0} if norm is None else {NORM: norm, f"{OWN_NORM}t0": norm})
    for before in (0, 1, 8):  # at the start, in the warm-up, and after it
        fresh = copy.deepcopy(policy)
        asked(fresh, known[:before])
        state = fresh.state_dict()
        assert asked(fresh, [odd, odd, odd]) == [[], [], []]
        assert fresh.state_dict() == state


def test_zeros_never_become_the_norm_to_clip_to() -> None:
    zeros = np.array([0.0] * 50 + [1.0, 1.1] * 30)
    for policy in (AutoClip(), ZClip()):
        assert all(most is None or most >= 1.0 for most in limits(policy, zeros))


def test_agc_clips_to_the_ratio_of_the_paper_at_every_step() -> None:
    expected = Action(
        kind="clip_rows",
        values={"ratio": 0.01},
        targets=("model.*",),
        reason="rows are limited by their weights' norm",
    )
    assert asked(AGC(targets=("model.*",)), series(NORM, [1, 2])) == [[expected]] * 2


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (ThresholdClipping, {"above": 0}, "above is 0; expected a number above 0"),
        (
            ThresholdClipping,
            {"recovered": 1.1},
            "recovered is 1.1; expected a number above 0 and at most 1",
        ),
        (ThresholdClipping, {"max_norm": None}, "max_norm is None"),
        (ThresholdClipping, {"metric": ["a/b/c"]}, "metric is .*; expected the name of one"),
        (AutoClip, {"percentile": 100}, "percentile is 100"),
        (AutoClip, {"window": 1}, "window is 1; expected an integer from 2 to 100,000"),
        (
            AutoClip,
            {"window": 10, "warmup": 10},
            "warmup is 10; expected less than window, which is 10",
        ),
        (AutoClip, {"window": 1e3}, "window is 1000.0"),
        (ZClip, {"alpha": 1.0}, "alpha is 1.0"),
        (ZClip, {"z": [2.5]}, r"z is \[2.5\]"),
        (ZClip, {"warmup": 1}, "warmup is 1; expected an integer from 2 to 10,000"),
        (AdaGC, {"relative": 0}, "relative is 0; expected a number above 0 and at most 1,000"),
        (AdaGC, {"beta": 1}, "beta is 1"),
        (AdaGC, {"warmup": 0}, "warmup is 0"),
        (AGC, {"ratio": math.nan}, "ratio is nan"),
        (AGC, {"targets": "*.weight"}, "targets is .*; expected a list of texts"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    policy: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        policy(**settings)
    assert "\n" not in str(error.value)

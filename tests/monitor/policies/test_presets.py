"""The original design's table, row by row, as its presets answer."""

from __future__ import annotations

import pytest

from tests.monitor.policies.policy_records import MEAN, NORM, OWN_MEAN, OWN_NORM, near, record
from ulysses_monitor.policies import PRESETS, Outcome, PolicySet, make_policies
from ulysses_monitor.policies.base import MAX_STEPS

STEPS = 100
B, A = "layers.0.q.lora_B.default.weight", "layers.0.q.lora_A.default.weight"
FIRST, SECOND = "ulysses-pro-2025-03", "ulysses-pro"


def asked(preset: str, step: int, mean: float, **more: float) -> dict[str, Outcome]:
    """What each policy of a fresh preset asks for at one step, by its name."""
    metrics = {MEAN: mean, NORM: 1.0, MAX_STEPS: float(STEPS)}
    metrics |= {key.replace("__", "/"): value for key, value in more.items()}
    outcomes = PolicySet(make_policies(preset), "active").decide(record(step, metrics))
    found = {d.policy: d for d in outcomes}
    assert len(found) == len(outcomes)
    return found


@pytest.mark.parametrize("preset", [FIRST, SECOND])
@pytest.mark.parametrize("mean", [1e-3, 5.0, 0.1])
def test_nothing_happens_between_or_at_the_thresholds(preset: str, mean: float) -> None:
    own = {f"{OWN_MEAN}a": 1e-9}
    assert asked(preset, 1, mean, **own) == {}
    assert asked(preset, STEPS, mean, **own) == {}


@pytest.mark.parametrize("mean", [0.999e-3, 1e-9, 0.0])
@pytest.mark.parametrize(
    ("preset", "step", "expected"),
    [
        (SECOND, 1, {"gradient_noise": 1e-4, "lr_boost": 1.2, "centralize": None}),
        (SECOND, 90, {"gradient_noise": 1e-4, "lr_boost": 1.2, "centralize": None}),
        (SECOND, 91, {"gradient_noise": 1e-5, "centralize": None}),
        (SECOND, 100, {"gradient_noise": 1e-5, "centralize": None}),
        (FIRST, 90, {"gradient_noise": 5e-3, "lr_boost": 1.2, "centralize": None}),
        (FIRST, 91, {"gradient_noise": 1e-5, "centralize": None}),
    ],
)
def test_below_a_thousandth_noise_a_higher_rate_and_centralization_until_nine_tenths(
    preset: str, step: int, expected: dict[str, float | None], mean: float
) -> None:
    found = asked(preset, step, mean)
    assert {n: next(iter(d.action.values.values()), None) for n, d in found.items()} == expected
    assert all(d.action.targets == ("*",) for d in found.values())
    kinds = {"gradient_noise": "add_noise", "lr_boost": "lr_factor", "centralize": "centralize"}
    assert all(d.action.kind == kinds[name] for name, d in found.items())


@pytest.mark.parametrize("preset", [FIRST, SECOND])
@pytest.mark.parametrize(("step", "factor"), [(1, 1.5), (90, 1.5), (91, 1.1), (100, 1.1)])
def test_a_tensor_below_a_ten_thousandth_is_scaled_where_the_mean_is_small_too(
    preset: str, step: int, factor: float
) -> None:
    own = {f"{OWN_MEAN}a": 0.999e-4, f"{OWN_MEAN}b": 1e-4}
    action = asked(preset, step, 0.999e-3, **own)["scale_small"].action
    assert (action.kind, dict(action.values)) == ("scale_each", {"a": factor})
    assert "scale_small" not in asked(preset, step, 1e-3, **own)


@pytest.mark.parametrize("preset", [FIRST, SECOND])
@pytest.mark.parametrize("step", [1, 91])
def test_above_five_the_norm_is_clipped_to_one_in_the_late_phase_too(
    preset: str, step: int
) -> None:
    found = asked(preset, step, 5.0000001)
    assert list(found) == ["clip_threshold"]
    action = found["clip_threshold"].action
    assert (action.kind, dict(action.values)) == ("clip_norm", {"max_norm": 1.0})


@pytest.mark.parametrize("preset", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("a", "b", "raised"),
    [
        (1.0, 0.0999, True),
        (1.0, 0.1001, False),
        (1.0, 9.999, False),
        (1.0, 10.001, True),
        (2e-8, 1.001e-8 * 200, True),
        (1e-8, 1.0, False),  # a norm that is not above 1e-8
        (1.0, 1e-8, False),
        (0.0, 1.0, False),  # as every LoRA begins
        (0.0, 0.0, False),
    ],
)
def test_a_lora_pair_whose_norms_differ_by_more_than_ten_is_raised_to_half(
    preset: str, a: float, b: float, *, raised: bool
) -> None:
    ratio = b / a if a else float("inf")
    norms = {f"{OWN_NORM}{A}": a, f"{OWN_NORM}{B}": b, "lora/grad_ratio_B_A/total": ratio}
    found = asked(preset, 1, 0.1, **norms)
    assert list(found) == ["lora_balance"] * raised
    if raised:
        action = found["lora_balance"].action
        assert (action.kind, action.values) == ("balance_lora", near({"share": 0.5}))
        assert action.targets == (A, B)


def test_the_two_versions_differ_only_in_their_noise() -> None:
    first, second = ({p.name: p.policy for p in make_policies(n)} for n in (FIRST, SECOND))
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == ["gradient_noise"]


@pytest.mark.parametrize("preset", PRESETS)
def test_policies_of_a_preset_name_it_and_have_the_mode_of_the_run(
    preset: str,
) -> None:
    policies = make_policies(preset)
    assert policies
    assert {(p.preset, p.mode) for p in policies} == {(preset, None)}
    assert {p.preset for p in make_policies(["zclip", preset])} == {"", preset}

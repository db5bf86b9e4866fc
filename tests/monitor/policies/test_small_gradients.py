"""Policies for small gradients, against values worked out by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from tests.monitor.policies.policy_records import (
    ALL_MEAN,
    MEAN,
    OWN_MEAN,
    Decides,
    acting_steps,
    asked,
    near,
    record,
    series,
    values_of,
)
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.noise import AnnealedNoise, GradientNoise
from ulysses_monitor.policies.small_gradients import (
    Centralization,
    LearningRateBoost,
    SmallGradientScaling,
)
from ulysses_monitor.records import Action

WHEN_SMALL: dict[str, tuple[Decides, Action]] = {
    "noise": (
        GradientNoise(),
        Action(
            kind="add_noise",
            values={"std": 1e-4},
            reason=f"{MEAN} is below 0.001: noise added",
            read={MEAN: 9e-4},
        ),
    ),
    "rate": (
        LearningRateBoost(),
        Action(
            kind="lr_factor",
            values={"factor": 1.2},
            reason=f"{MEAN} is below 0.001: learning rate x 1.2",
            read={MEAN: 9e-4},
        ),
    ),
    "centralization": (
        Centralization(),
        Action(
            kind="centralize",
            reason=f"{MEAN} is below 0.001: centralized",
            read={MEAN: 9e-4},
        ),
    ),
}


@pytest.mark.parametrize("name", WHEN_SMALL)
def test_an_action_says_what_it_does_why_and_what_was_read(name: str) -> None:
    policy, expected = WHEN_SMALL[name]
    assert asked(policy, series(MEAN, [9e-4])) == [[expected]]


def test_it_stops_a_quarter_above_the_threshold_and_starts_again_below_it() -> None:
    values = [1e-3, 9.99e-4, 1.2e-3, 1.2499e-3, 1.25e-3, 1.2e-3, 1e-3, 9.99e-4, 0.0, math.inf]
    assert acting_steps(LearningRateBoost(), series(MEAN, values)) == [2, 3, 4, 8, 9]
    assert acting_steps(LearningRateBoost(recovered=1.0), series(MEAN, values)) == [2, 8, 9]


def test_a_step_without_the_metric_changes_neither_spell_nor_patience() -> None:
    values = [9e-4, math.nan, 9e-4, math.nan, 1.2e-3, 2e-3, math.nan, 1.2e-3]
    assert acting_steps(LearningRateBoost(patience=2), series(MEAN, values)) == [3, 5]
    other = [record(1, {MEAN: 9e-4}), record(2, {ALL_MEAN: 9e-4}), record(3, {MEAN: 1.2e-3})]
    assert acting_steps(LearningRateBoost(), other) == [1, 3]


def test_the_metric_can_be_set() -> None:
    policy = LearningRateBoost(metric="train/loss/total", below=2.0)
    assert acting_steps(policy, series("train/loss/total", [2.5, 1.9])) == [2]
    assert policy.needed_metrics == ("train/loss/total",)


# -- thresholds by the run's own start --------------------------------------------------------


def test_a_relative_threshold_is_a_share_of_the_median_of_the_first_steps() -> None:
    start = [3.0, 1.0, 10.0, 2.0]
    policy = LearningRateBoost(relative=True, below=0.5, reference=4)
    assert policy.steps_before_acting == 4
    edge = 0.5 * statistics.median(start)
    values = [*start, edge, edge * (1 - 1e-12), edge * 1.2499, edge * 1.25]
    assert acting_steps(policy, series(MEAN, values)) == [6, 7]
    assert "is below 0.5 times its value at the start" in policy._reason("x")


def test_steps_without_a_value_do_not_count_as_first_steps() -> None:
    policy = LearningRateBoost(relative=True, below=0.5, reference=3)
    values = [math.nan, 4.0, math.inf, math.nan, 4.0, 4.0, 2.0, 1.9]
    assert acting_steps(policy, series(MEAN, values)) == [8]


def test_relative_noise_is_a_share_of_the_mean_gradient_of_the_step() -> None:
    policy = GradientNoise(relative=True, below=0.5, reference=1, std=0.25)
    records = [
        record(1, {MEAN: 8.0, ALL_MEAN: 5.0}),
        record(2, {MEAN: 3.0, ALL_MEAN: 0.7}),
        record(3, {MEAN: 3.0}),
    ]
    assert policy.needed_metrics == (MEAN, ALL_MEAN)
    nothing, (noise,), unknown = asked(policy, records)
    assert noise.values == near({"std": 0.175})
    assert (nothing, unknown) == ([], [])


# -- noise ------------------------------------------------------------------------------------


def test_annealed_noise_has_the_variance_of_the_paper_from_t_0_on() -> None:
    """arXiv:1511.06807: variance eta / (1 + t) ** gamma, where step 1 is t = 0."""
    records = [record(step, {}) for step in (1, 2, 3, 1000)]
    found = [action.values["std"] for (action,) in asked(AnnealedNoise(), records)]
    expected = [math.sqrt(0.01 / (1 + t) ** 0.55) for t in (0, 1, 2, 999)]
    assert found == pytest.approx(expected, rel=1e-12)
    ((other,),) = asked(AnnealedNoise(eta=0.3, gamma=1.0, targets=("*.bias",)), [records[2]])
    assert (other.values["std"], other.targets) == (pytest.approx(math.sqrt(0.1)), ("*.bias",))


def test_annealed_noise_never_pauses_but_can_be_bounded() -> None:
    records = [record(step, {}) for step in range(1, 501)]
    assert acting_steps(AnnealedNoise(), records) == list(range(1, 501))
    assert acting_steps(AnnealedNoise(most=30, patience=11), records) == list(range(11, 41))


# -- tensors that are small themselves --------------------------------------------------------


def tensors(step: int, mean: float, **own: float) -> Any:
    return record(step, {MEAN: mean} | {f"{OWN_MEAN}{name}": v for name, v in own.items()})


def test_only_tensors_below_their_own_threshold_are_scaled() -> None:
    (actions,) = asked(
        SmallGradientScaling(), [tensors(1, 9e-4, a=9.999e-5, b=1e-4, c=1.0, d=1e-9, e=0.0)]
    )
    assert actions == [
        Action(
            kind="scale_each",
            values={"a": 1.5, "d": 1.5},
            targets=("a", "d"),
            reason=f"{MEAN} is below 0.001: 2 small tensors x 1.5",
            read={MEAN: 9e-4, f"{OWN_MEAN}a": 9.999e-5, f"{OWN_MEAN}d": 1e-9},
        )
    ]
    assert asked(SmallGradientScaling(), [tensors(1, 1e-3, a=1e-9)]) == [[]]
    assert asked(SmallGradientScaling(), [tensors(1, 9e-4, a=1e-4)]) == [[]]


def test_relative_scaling_compares_each_tensor_with_its_own_start() -> None:
    policy = SmallGradientScaling(relative=True, below=0.5, own_below=0.25, reference=2)
    records = [
        tensors(1, 1.0, a=1.0, b=100.0),
        tensors(2, 1.0, a=3.0, b=300.0),  # means of the start: 2 and 200
        tensors(3, 0.4, a=0.5, b=49.9),
        tensors(4, 0.4, a=0.4999, b=50.0),
        tensors(5, 0.7, a=0.1, b=10.0),
    ]
    found = [values_of(actions) for actions in asked(policy, records)]
    assert found == [
        [],
        [],
        [("scale_each", {"b": 1.5})],
        [("scale_each", {"a": 1.5})],
        [],
    ]


def test_steps_outside_the_start_do_not_count_for_the_tensors_either() -> None:
    policy = SmallGradientScaling(relative=True, below=0.5, own_below=0.5, reference=2)
    records = [
        record(1, {MEAN: 1.0}),
        tensors(2, math.nan, a=1000.0),
        tensors(3, 1.0, a=2.0),
        tensors(4, 0.4, a=1.01),
        tensors(5, 0.4, a=0.99),
    ]
    assert acting_steps(policy, records) == [5]


@pytest.mark.parametrize("own", [{"a": 0.1, "b": 0.1, "c": 0.1}, {"a": 0.1, "c": 0.1}])
def test_parameters_untrained_at_the_start_are_not_compared_with_others(
    own: dict[str, float],
) -> None:
    policy = SmallGradientScaling(relative=True, below=0.5, own_below=0.5, reference=1)
    records = [tensors(1, 1.0, a=2.0, b=2.0), tensors(2, 0.4, **own), tensors(3, 0.4, a=0.1, b=3.0)]
    assert acting_steps(policy, records) == [3]


# -- centralization ---------------------------------------------------------------------------


def test_centralization_can_run_at_every_step_without_metrics() -> None:
    policy = Centralization(always=True, targets=["*.weight"])  # type: ignore[arg-type]
    assert (policy.needed_metrics, policy.steps_before_acting) == ((), 0)
    expected = Action(kind="centralize", targets=("*.weight",), reason="centralized at every step")
    assert asked(policy, series("a/b/c", [1.0] * 300)) == [[expected]] * 300


@pytest.mark.parametrize(
    "idle", [{"below": 0.1}, {"longest": 5}, {"patience": 2}, {"relative": True, "below": 0.5}]
)
def test_settings_without_effect_are_refused_with_always(idle: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has no effect with always"):
        Centralization(always=True, **idle)
    Centralization(**idle)


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (GradientNoise, {"std": 0}, r"std is 0; expected a number above 0 and at most 1,000"),
        (GradientNoise, {"std": math.nan}, r"std is nan"),
        (GradientNoise, {"below": 0.0}, r"below is 0.0; expected a number above 0"),
        (
            GradientNoise,
            {"below": 2.0, "relative": True},
            r"below is 2.0; expected a number above 0 and at most 1",
        ),
        (GradientNoise, {"recovered": 0.99}, r"recovered is 0.99; expected a number from 1"),
        (GradientNoise, {"reference": 0}, r"reference is 0; expected an integer from 1 to 10,000"),
        (GradientNoise, {"metric": 3}, r"metric is 3; expected the name of one metric"),
        (GradientNoise, {"metric": "grad/*/total"}, r"metric is 'grad/\*/total'; expected"),
        (GradientNoise, {"relative": "yes"}, r"relative is 'yes'; expected true or false"),
        (GradientNoise, {"relative": 1}, r"relative is 1; expected true or false"),
        (GradientNoise, {"targets": "*.weight"}, r"targets is '\*.weight'; expected a list"),
        (GradientNoise, {"targets": ()}, r"targets is \[\]; expected a list of texts, such as"),
        (GradientNoise, {"targets": ["a", 3]}, r"targets.1 is 3; expected text"),
        (GradientNoise, {"targets": None}, r"targets is None; expected a list"),
        (AnnealedNoise, {"eta": -1.0}, r"eta is -1.0"),
        (AnnealedNoise, {"gamma": "x"}, r"gamma is 'x'"),
        (AnnealedNoise, {"targets": "*"}, r"targets is '\*'"),
        (SmallGradientScaling, {"factor": math.inf}, r"factor is inf"),
        (SmallGradientScaling, {"own_below": True}, r"own_below is True"),
        (
            LearningRateBoost,
            {"factor": 11},
            r"factor is 11; expected a number above 0 and at most 10",
        ),
        (Centralization, {"always": 1}, r"always is 1; expected true or false"),
        (Centralization, {"targets": "*"}, r"targets is '\*'"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    policy: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        policy(**settings)
    assert "\n" not in str(error.value)


def test_changing_a_given_list_does_not_change_the_policy() -> None:
    targets = ["*.weight"]
    policy = GradientNoise(targets=targets)  # type: ignore[arg-type]
    targets[0] = "other"
    ((action,),) = asked(policy, series(MEAN, [1e-4]))
    assert action.targets == ("*.weight",)

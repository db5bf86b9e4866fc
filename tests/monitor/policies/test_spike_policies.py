"""Spikes that are single, repeated, lasting, or spoil the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.monitor.policies.policy_records import (
    LOSS,
    NORM,
    acting_steps,
    asked,
    record,
    series,
    values_of,
)
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.escalation import SpikeEscalation
from ulysses_monitor.policies.outliers import SkipOutliers
from ulysses_monitor.records import Action, StepRecord

CALM = (1.0, 1.1)
"""Two alternating values: mean 1.05, deviation about 0.05."""


def training(steps: int, spikes: Mapping[int, float] | None = None) -> list[StepRecord]:
    """Makes a calm training, except for steps whose loss and norm are given."""
    values = {step: CALM[step % 2] for step in range(1, steps + 1)} | dict(spikes or {})
    return [record(step, {LOSS: values[step], NORM: values[step]}) for step in range(1, steps + 1)]


# -- skipping ---------------------------------------------------------------------------------


def outliers(values: np.ndarray, window: int, warmup: int, sigmas: float) -> set[int]:
    found = set()
    for i in range(warmup, len(values)):
        past = values[max(0, i - window) : i]
        if values[i] > past.mean() + sigmas * past.std(ddof=1):
            found.add(i + 1)
    return found


@pytest.mark.parametrize(("window", "warmup", "sigmas"), [(128, 64, 6.0), (20, 2, 3.0)])
def test_steps_above_mean_plus_six_deviations_of_earlier_steps_are_skipped(
    window: int, warmup: int, sigmas: float
) -> None:
    rng = np.random.default_rng(3)
    losses = 2 + 0.1 * rng.standard_normal(300)
    norms = np.exp(0.3 * rng.standard_normal(300))
    losses[[30, 70, 150, 290]] += 5.0
    norms[[63, 64, 200, 201]] *= 50.0
    records = [
        record(i, {LOSS: a, NORM: b}) for i, (a, b) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    policy = SkipOutliers(window=window, warmup=warmup, sigmas=sigmas)
    expected = outliers(losses, window, warmup, sigmas) | outliers(norms, window, warmup, sigmas)
    assert policy.steps_before_acting == warmup
    assert len(expected) >= 5
    assert acting_steps(policy, records) == sorted(expected)


def test_the_limit_is_exact_and_in_the_reason() -> None:
    past = np.array([CALM[i % 2] for i in range(64)])
    limit = float(past.mean() + 6 * past.std(ddof=1))
    below = series(LOSS, [*past, limit])
    above = series(LOSS, [*past, limit * (1 + 1e-12)])
    assert acting_steps(SkipOutliers(metrics=(LOSS,)), below) == []
    *_, (action,) = asked(SkipOutliers(metrics=(LOSS,)), above)
    assert action == Action(
        kind="skip",
        reason=f"{LOSS} is {limit:.4g}, above {limit:.4g}",
        read={LOSS: limit * (1 + 1e-12)},
    )


def test_an_action_reads_only_the_metrics_that_are_outliers() -> None:
    calm = training(100)
    last = record(101, {LOSS: 50.0, NORM: 70.0})
    *_, (action,) = asked(SkipOutliers(), [*calm, last])
    assert dict(action.read) == {LOSS: 50.0, NORM: 70.0}
    *_, (action,) = asked(SkipOutliers(), [*calm, record(101, {LOSS: 1.0, NORM: 70.0})])
    assert (dict(action.read), action.reason[: len(NORM)]) == ({NORM: 70.0}, NORM)


def test_at_most_ten_steps_in_a_row_are_skipped_and_a_new_level_becomes_normal() -> None:
    records = training(400, dict.fromkeys(range(201, 401), 9.0))
    # Of p = k / 128 at the new level, p + 6 * sqrt(p * (1 - p)) is above 1 from k = 4 on.
    assert acting_steps(SkipOutliers(), records) == [201, 202, 203, 204]
    rising = training(400, {step: 10.0 ** (step - 200) for step in range(201, 221)})
    assert acting_steps(SkipOutliers(), rising) == list(range(201, 211))


def test_patience_waits_for_a_second_outlier() -> None:
    records = training(120, {100: 9.0, 110: 9.0, 111: 90.0})
    assert acting_steps(SkipOutliers(patience=2), records) == [111]


@pytest.mark.parametrize("hole", [math.nan, math.inf, None])
def test_unknown_values_do_not_enter_the_window(hole: float | None) -> None:
    """Every third step has no value; the warm-up counts the 64 steps that have one."""
    records = [
        record(step, {} if hole is None else {LOSS: hole}) if step % 3 == 0 else each
        for step, each in enumerate(training(110, {95: 1.5, 97: 9.0, 101: 90.0}), 1)
    ]
    policy = SkipOutliers(metrics=(LOSS,))
    expected = [97, 101] if hole != math.inf else [96, 97, 99, 101, 102, 105, 108]
    assert acting_steps(policy, records) == expected
    assert all(map(math.isfinite, policy.memory["seen"][LOSS]))


# -- the ladder -------------------------------------------------------------------------------

SHORT: dict[str, Any] = {
    "window": 8,
    "warmup": 4,
    "longest": 2,
    "patience": 2,
    "hold": 3,
    "snapshot_every": 0,
}


def ladder(**settings: Any) -> SpikeEscalation:
    return SpikeEscalation(**(SHORT | settings))


def found(policy: SpikeEscalation, records: list[StepRecord]) -> dict[int, list[Any]]:
    """Returns the kinds of action at each step that has any; a rate with its factor."""
    steps = {}
    for each, actions in zip(records, asked(policy, records), strict=True):
        if actions:
            steps[each.step] = [a.values.get("factor", a.kind) for a in actions]
    return steps


def test_a_single_spike_is_skipped_and_does_not_enter_the_window() -> None:
    policy = ladder(patience=8)
    records = training(20, {8: 9.0, 11: 1.6, 14: 9.0})
    assert found(policy, records) == {8: ["skip"], 11: ["skip"], 14: ["skip"]}
    assert set(policy.memory["sound"][LOSS]) == set(CALM)
    ((action,),) = asked(policy, [record(21, {LOSS: 9.0, NORM: 7.0})])
    assert (action.kind, dict(action.values)) == ("skip", {})
    assert dict(action.read) == {LOSS: 9.0, NORM: 7.0}


def test_a_spike_is_an_outlier_in_both_norm_and_loss() -> None:
    """The limits are six deviations of the norm and three of the loss."""
    past = np.array([CALM[step % 2] for step in range(1, 9)])
    norm, loss = (past.mean() + k * past.std(ddof=1) for k in (6, 3))
    for norm_is, loss_is in ((1, 1), (1, -1), (-1, 1)):
        last = record(9, {NORM: norm * (1 + 1e-9 * norm_is), LOSS: loss * (1 + 1e-9 * loss_is)})
        expected = {9: ["skip"]} if norm_is == loss_is == 1 else {}
        assert found(ladder(sigmas=6.0, loss_sigmas=3.0), [*training(8), last]) == expected


def test_no_step_is_a_spike_before_the_warm_up_is_over() -> None:
    assert found(ladder(), training(8, {4: 9.0})) == {}
    assert found(ladder(), training(8, {5: 9.0})) == {5: ["skip"]}
    assert SpikeEscalation().steps_before_acting == 20


def test_repeated_spikes_lower_the_rate_for_the_hold() -> None:
    expected = {7: ["skip"], 9: [0.5, "skip"], 10: [0.5], 11: [0.5], 12: [0.5]}
    assert found(ladder(), training(20, {7: 9.0, 9: 9.0})) == expected
    without = ladder(hold=0)
    assert found(without, training(20, {7: 9.0, 9: 9.0})) == {7: ["skip"], 9: [0.5, "skip"]}


def test_the_reason_names_the_last_step_of_a_lowered_rate() -> None:
    actions = asked(ladder(), training(9, {7: 9.0, 9: 9.0}))[-1]
    assert actions[0].reason == "rate lowered until step 12"


def test_spikes_further_apart_than_the_window_do_not_add_up() -> None:
    assert found(ladder(), training(20, {7: 9.0, 15: 9.0})) == {7: ["skip"], 15: ["skip"]}
    assert found(ladder(), training(14, {7: 9.0, 14: 9.0}))[14] == [0.5, "skip"]


def test_a_rate_that_was_lowered_twice_doubles_twice() -> None:
    spikes = dict.fromkeys((7, 9, 11, 13), 9.0)
    steps = found(ladder(), training(30, spikes))
    rates = {step: asked_for[0] for step, asked_for in steps.items() if asked_for[0] != "skip"}
    quarter, half = dict.fromkeys(range(13, 17), 0.25), dict.fromkeys(range(17, 20), 0.5)
    # After 13 it has been lowered by spikes 7 and 9, held from 9 on, and by 11 and 13.
    assert rates == dict.fromkeys(range(9, 13), 0.5) | quarter | half


def test_the_rate_is_not_lowered_below_the_floor() -> None:
    spikes = dict.fromkeys(range(7, 60, 2), 9.0)
    rates = [
        a.values["factor"]
        for actions in asked(ladder(hold=50, floor=0.2), training(60, spikes))
        for a in actions
        if a.kind == "lr_factor"
    ]
    assert rates[:2] == [0.5, 0.5]
    assert set(rates) == {0.5, 0.25, 0.2}
    assert rates[-1] == 0.2


def test_a_rate_that_rises_from_the_floor_ends_at_the_full_rate() -> None:
    """From 0.4 the rate doubles to 0.8 and then rises to 1, not 1.6; the next spikes halve 1."""
    spikes = dict.fromkeys((7, 9, 11, 13, 40, 42), 9.0)
    steps = found(ladder(floor=0.4), training(45, spikes))
    rates = {step: asked_for[0] for step, asked_for in steps.items() if asked_for[0] != "skip"}
    first = dict.fromkeys(range(9, 13), 0.5) | dict.fromkeys(range(13, 17), 0.4)
    again = dict.fromkeys(range(17, 20), 0.8) | dict.fromkeys(range(42, 46), 0.5)
    assert rates == first | again


def test_what_lasts_longer_than_longest_is_a_new_level_and_not_a_spike() -> None:
    """A lasting level is neither skipped for good nor does it lower the rate further."""
    policy = ladder(patience=3)
    records = training(40, dict.fromkeys(range(10, 41), 9.0))
    assert found(policy, records) == {10: ["skip"], 11: ["skip"]}
    assert set(policy.memory["sound"][LOSS]) == {9.0}


def test_unknown_values_do_not_spoil_the_memory() -> None:
    policy = ladder()
    holes = [record(1, {}), record(2, {LOSS: math.nan, NORM: math.inf})]
    records = [*holes, *training(20, {12: 9.0})[2:]]
    records[9] = record(10, {NORM: 1.0})
    assert found(policy, records) == {12: ["skip"]}
    assert (policy.memory["first"], policy.memory["sound"][NORM]) == (CALM[1], [*CALM[::-1]] * 4)
    assert math.isfinite(policy.memory["smooth"])


# -- snapshots and going back -----------------------------------------------------------------


def test_snapshots_come_at_their_interval_and_never_at_a_spike() -> None:
    steady = {step: 9.0 if step == 10 else 1.0 for step in range(1, 28)}
    policy = ladder(snapshot_every=5, steps_back=5)
    assert found(policy, training(27, steady)) == {
        5: ["snapshot"],
        10: ["skip"],
        11: ["snapshot"],
        16: ["snapshot"],
        21: ["snapshot"],
        26: ["snapshot"],
    }
    assert found(ladder(), training(60)) == {}
    every_step = dict.fromkeys(range(1, 81), 1.0)
    assert acting_steps(SpikeEscalation(), training(80, every_step)) == [25, 50, 75]


LOSSES = [10.0, *[2.0] * 5]
"""With a smoothing of a half: 10, 6, 4, 3, 2.5, 2.25; the gain is 7.75."""


def falls(back: float, steps: int) -> list[StepRecord]:
    """Makes a loss that falls and is `back` from step 7 on."""
    return series(LOSS, [*LOSSES, *[back] * (steps - len(LOSSES))], grad__norm__total=1.0)


def setback(**settings: Any) -> SpikeEscalation:
    """Makes a policy that sees no spikes and takes the loss to be free of noise."""
    given = {
        "sigmas": 1e6,
        "smoothing": 0.5,
        "setback": 0.25,
        "certainty": 1e-9,
        "snapshot_every": 5,
        "steps_back": 3,
        "skip_steps": 2,
        "cooldown": 4,
        "most": 2,
        "hold": 100,
    }
    return ladder(**(given | settings))


def test_a_loss_that_gives_back_its_gain_rolls_back_and_lowers_the_rate() -> None:
    """The smoothed loss is 5.125 after one step at 8: (5.125 - 2.25) / 7.75 is 37 % of the gain."""
    *calm, last = asked(setback(), falls(8.0, 7))
    assert [values_of(actions) for actions in calm if actions] == [[("snapshot", {})]]
    assert values_of(last) == [
        ("lr_factor", {"factor": 0.5}),
        ("roll_back", {"steps_back": 3.0, "skip_steps": 2.0}),
    ]
    assert last[1].reason == "the smoothed loss has given back 37% of what it had gained"
    assert last[1].read == {LOSS: 8.0}


@pytest.mark.parametrize(("certainty", "steps"), [(0.99, [8]), (1.01, [])])
def test_a_rise_within_the_noise_does_not_roll_back(certainty: float, steps: list[int]) -> None:
    """An average with s = 1/2 keeps a third of the variance; step differences have it twice."""
    losses = np.array([*LOSSES, 8.0, 8.0])
    noise = np.diff(losses).std() * math.sqrt(0.5 / 3)
    rise = 0.25 * 2.25 + 0.75 * 8.0 - 2.25
    policy = setback(setback=0.4, certainty=certainty * rise / noise)
    assert acting_steps(policy, falls(8.0, 8), "roll_back") == steps


@pytest.mark.parametrize(("share", "back"), [(0.3709, True), (0.371, False)])
def test_the_setback_is_a_share_of_the_gain(share: float, *, back: bool) -> None:
    assert (share < 2.875 / 7.75) == back
    steps = acting_steps(setback(setback=share), falls(8.0, 7), "roll_back")
    assert steps == [7] * back


def test_it_rolls_back_once_per_cooldown_and_at_most_most_times() -> None:
    assert acting_steps(setback(), falls(8.0, 60), "roll_back") == [7, 12]
    assert acting_steps(setback(cooldown=0), falls(8.0, 60), "roll_back") == [7, 8]
    assert acting_steps(setback(most=3, cooldown=9), falls(8.0, 60), "roll_back") == [7, 17, 27]
    assert acting_steps(setback(most=0), falls(8.0, 60), "roll_back") == []


def test_without_a_snapshot_it_does_not_roll_back() -> None:
    assert acting_steps(setback(snapshot_every=0), falls(8.0, 30), "roll_back") == []
    # The first is due after the loss has come up, and taken: there is none before.
    late = asked(setback(snapshot_every=9), falls(8.0, 12))
    assert [i for i, actions in enumerate(late, 1) if actions] == [9, 10, 11, 12]
    assert [a.kind for a in late[8]] == ["snapshot"]
    assert [a.kind for a in late[9]] == ["lr_factor", "roll_back"]


@pytest.mark.parametrize(("gained", "gain"), [(0.7, 7.75), (0.8, 8.0)])
def test_the_gain_is_at_least_a_share_of_the_first_loss(gained: float, gain: float) -> None:
    for share, steps in ((2.875 / gain - 1e-9, [7]), (2.875 / gain + 1e-9, [])):
        policy = setback(gained=gained, setback=share)
        assert acting_steps(policy, falls(8.0, 7), "roll_back") == steps


def test_no_snapshot_is_taken_of_spoilt_weights_or_after_the_last_roll_back() -> None:
    """More than half of the setback prevents a snapshot: 17 % at step 8, 23 % in the end."""
    spoilt = setback(setback=0.3, snapshot_every=4, steps_back=4)
    assert acting_steps(spoilt, falls(4.0, 40), "snapshot") == [4]
    sound = setback(setback=0.6, snapshot_every=4, steps_back=4)
    assert acting_steps(sound, falls(4.0, 17), "snapshot") == [4, 8, 12, 16]
    done = setback(most=1)
    steps = acting_steps(done, falls(8.0, 60), "snapshot")
    assert steps == [5]
    assert acting_steps(setback(most=0), falls(2.0, 60), "snapshot") == []


def test_a_skipped_spike_is_not_a_setback() -> None:
    policy = setback(sigmas=6.0, window=8, warmup=4, smoothing=0.5)
    records = falls(2.0, 40)
    records[30] = record(31, {LOSS: 100.0, NORM: 100.0})
    asked_for = found(policy, records)
    assert asked_for[31] == ["skip"]
    assert all(kinds in (["snapshot"], ["skip"]) for kinds in asked_for.values())


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (SkipOutliers, {"metrics": LOSS}, "metrics is 'train/loss/total'; expected a list"),
        (
            SkipOutliers,
            {"metrics": []},
            r"metrics is \[\]; expected a list of names of metrics, such as",
        ),
        (SkipOutliers, {"metrics": None}, "metrics is None"),
        (
            SkipOutliers,
            {"metrics": ["grad/*"]},
            r"metrics.0 is 'grad/\*'; expected the name of one metric, such as grad/norm/total",
        ),
        (
            SkipOutliers,
            {"window": 50},
            "warmup is 64; expected at most window, which is 50, or it can never act",
        ),
        (SkipOutliers, {"warmup": 1}, "warmup is 1; expected an integer from 2 to 100,000"),
        (SkipOutliers, {"sigmas": 0}, "sigmas is 0"),
        (SkipOutliers, {"window": "128"}, "window is '128'"),
        (SpikeEscalation, {"warmup": 129}, "can never act"),
        (SpikeEscalation, {"longest": 0}, "longest is 0; expected an integer from 1 to 10,000"),
        (
            SpikeEscalation,
            {"patience": 129},
            "patience is 129; expected at most window, which is 128",
        ),
        (
            SpikeEscalation,
            {"steps_back": 26},
            "steps_back is 26; expected at most snapshot_every, which is 25",
        ),
        (SpikeEscalation, {"lowered": 0}, "lowered is 0; expected a number above 0 and at most 1"),
        (SpikeEscalation, {"setback": 1.5}, "setback is 1.5"),
        (SpikeEscalation, {"smoothing": None}, "smoothing is None"),
        (SpikeEscalation, {"most": -1}, "most is -1; expected an integer from 0 to 1,000,000"),
        (SpikeEscalation, {"hold": True}, "hold is True"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    policy: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        policy(**settings)
    assert "\n" not in str(error.value)


def test_without_snapshots_their_age_does_not_matter() -> None:
    assert SpikeEscalation(snapshot_every=0, steps_back=100).steps_back == 100

"""Schedules at their first and last steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.monitor.policies.policy_records import asked, record, values_of
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.base import MAX_STEPS, share_to_steps
from ulysses_monitor.policies.schedules import FreezeSchedule, WarmupCosine
from ulysses_monitor.records import Action


def training(steps: int, more: int = 0) -> list[Any]:
    return [record(i, {MAX_STEPS: float(steps)}) for i in range(1, steps + more + 1)]


def factors(policy: WarmupCosine, steps: int, more: int = 0) -> list[float]:
    found = []
    for actions in asked(policy, training(steps, more)):
        (factor,) = (a.values["factor"] for a in actions if a.kind == "lr_factor")
        found.append(factor)
    return found


def cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))


# -- warm-up and cosine -----------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.2, 2])
def test_the_warm_up_rises_to_the_full_rate_and_the_cosine_falls_from_it(warmup: float) -> None:
    found = factors(WarmupCosine(warmup=warmup), 10)
    expected = [0.5, 1.0, *(cosine(i / 8) for i in range(8))]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[-1] == pytest.approx(0.5 * (1 - math.cos(math.pi / 8)))


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert factors(WarmupCosine(warmup=0), 4) == pytest.approx([cosine(i / 4) for i in range(4)])


def test_the_cosine_is_at_its_lowest_after_the_last_step_and_stays() -> None:
    found = factors(WarmupCosine(warmup=0, lowest=0.1), 4, more=3)
    assert found[:4] == pytest.approx([0.1 + 0.9 * cosine(i / 4) for i in range(4)], rel=1e-12)
    assert found[4:] == pytest.approx([0.1, 0.1, 0.1])


def test_by_default_three_in_a_hundred_steps_warm_up_rounded_up_as_in_transformers() -> None:
    assert factors(WarmupCosine(), 100)[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert factors(WarmupCosine(), 101)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_share_of_a_hundred_steps_is_that_many(percent: int) -> None:
    """0.07 * 100 is 7.000000000000001, which would round up to 8."""
    assert share_to_steps(percent / 100, 100) == percent
    assert factors(WarmupCosine(warmup=percent / 100), 100).index(1.0) == percent - 1


def test_a_warm_up_as_long_as_the_training_only_rises() -> None:
    assert factors(WarmupCosine(warmup=4), 4) == [0.25, 0.5, 0.75, 1.0]
    assert factors(WarmupCosine(warmup=8), 4) == [0.125, 0.25, 0.375, 0.5]
    assert factors(WarmupCosine(warmup=0.999), 4) == [0.25, 0.5, 0.75, 1.0]
    assert factors(WarmupCosine(warmup=1), 2) == [1.0, 1.0]


def test_gradients_are_clipped_only_after_the_warm_up() -> None:
    first, second, third, fourth = asked(WarmupCosine(warmup=2), training(4))
    assert [a.kind for a in (*first, *second)] == ["lr_factor", "lr_factor"]
    assert third == [
        Action(kind="clip_norm", values={"max_norm": 1.0}, reason="clipped after the warm-up"),
        Action(
            kind="lr_factor",
            values={"factor": 1.0},
            reason="cosine, step 3 of 4",
            read={MAX_STEPS: 4.0},
        ),
    ]
    assert values_of(fourth)[0] == ("clip_norm", {"max_norm": 1.0})
    assert second[0].reason == "warm-up, step 2 of 4"
    never = asked(WarmupCosine(warmup=2, max_norm=None), training(4))
    assert [a.kind for actions in never for a in actions] == ["lr_factor"] * 4


@pytest.mark.parametrize("metrics", [{}, {MAX_STEPS: math.nan}])
def test_without_a_known_number_of_steps_the_schedules_do_nothing(
    metrics: dict[str, float],
) -> None:
    assert asked(WarmupCosine(warmup=2), [record(1, metrics)]) == [[]]
    assert asked(FreezeSchedule(targets=("a",)), [record(1, metrics)]) == [[]]


# -- freezing ---------------------------------------------------------------------------------


def frozen(steps: int, **settings: float) -> list[int]:
    found = asked(FreezeSchedule(targets=("*embed*",), **settings), training(steps))
    return [step for step, actions in enumerate(found, 1) if actions]


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 4, [1, 2, 3, 4]),
        ({"begin": 2, "end": 4}, 6, [3, 4]),
        ({"begin": 1, "end": 2}, 6, [2]),
        ({"begin": 1}, 4, [2, 3, 4]),
        ({"begin": 1, "end": 1}, 4, [2, 3, 4]),
        ({"end": 2}, 6, [1, 2]),
        ({"begin": 4}, 6, [5, 6]),
        ({"begin": 0.5}, 6, [4, 5, 6]),
        ({"end": 0.5}, 6, [1, 2, 3]),
        ({"begin": 0.25, "end": 0.75}, 8, [3, 4, 5, 6]),
        ({"begin": 0.5, "end": 5}, 6, [4, 5]),
        ({"begin": 2, "end": 0.5}, 6, [3]),
        ({"end": 0.29}, 100, list(range(1, 30))),
        ({"begin": 0.55}, 100, list(range(56, 101))),
    ],
)
def test_parameters_are_frozen_from_begin_to_end(
    settings: dict[str, float], steps: int, expected: list[int]
) -> None:
    assert frozen(steps, **settings) == expected


@pytest.mark.parametrize("steps", [4, 5, 7, 100])
@pytest.mark.parametrize("share", [0.29, 0.5, 0.55])
def test_two_adjacent_schedules_cover_each_step_once(steps: int, share: float) -> None:
    assert frozen(steps, end=share) + frozen(steps, begin=share) == list(range(1, steps + 1))


def test_freezing_names_its_targets_and_its_end() -> None:
    policy = FreezeSchedule(targets=["*embed*", "lm_head.*"], end=2)  # type: ignore[arg-type]
    expected = Action(kind="freeze", targets=("*embed*", "lm_head.*"), reason="frozen until step 2")
    assert asked(policy, training(3)) == [[expected], [expected], []]


def test_schedules_say_whether_they_need_the_number_of_steps() -> None:
    targets = ("a",)
    assert WarmupCosine().needed_metrics == (MAX_STEPS,)
    assert FreezeSchedule(targets=targets, begin=0.5, end=7).needed_metrics == (MAX_STEPS,)
    assert FreezeSchedule(targets=targets).needed_metrics == (MAX_STEPS,)
    assert FreezeSchedule(targets=targets, end=7).needed_metrics == ()
    assert FreezeSchedule(targets=targets, begin=3, end=7).needed_metrics == ()
    assert FreezeSchedule(targets=targets, begin=3, end=7).steps_before_acting == 3
    assert FreezeSchedule(targets=targets, begin=0.3).steps_before_acting == 0


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (
            WarmupCosine,
            {"warmup": -0.1},
            "warmup is -0.1; expected a share of all steps from 0 to 1",
        ),
        (
            WarmupCosine,
            {"warmup": 1.5},
            "warmup is 1.5; expected a share .* or a whole number of steps",
        ),
        (WarmupCosine, {"warmup": "some"}, "warmup is 'some'"),
        (WarmupCosine, {"warmup": math.nan}, "warmup is nan"),
        (WarmupCosine, {"lowest": -1e-10}, "lowest is -1e-10; expected a number from 0 to 1"),
        (WarmupCosine, {"max_norm": 0}, "max_norm is 0"),
        (WarmupCosine, {"max_norm": "none"}, "max_norm is 'none'"),
        (FreezeSchedule, {}, r"targets is \[\]; expected a list of texts, such as \['\*embed\*'"),
        (FreezeSchedule, {"targets": "*embed*"}, "targets is .*; expected a list"),
        (FreezeSchedule, {"targets": [None]}, "targets.0 is None; expected text"),
        (FreezeSchedule, {"targets": ["a"], "begin": 2, "end": 2}, "which freezes nothing"),
        (FreezeSchedule, {"targets": ["a"], "begin": 0.5, "end": 0.5}, "which freezes nothing"),
        (FreezeSchedule, {"targets": ["a"], "begin": 3, "end": 0}, "which freezes nothing"),
        (FreezeSchedule, {"targets": ["a"], "end": 0}, "which freezes nothing"),
        (FreezeSchedule, {"targets": ["a"], "end": 2.5}, "end is 2.5; expected a share"),
        (FreezeSchedule, {"targets": ["a"], "begin": False}, "begin is False"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    policy: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        policy(**settings)
    assert "\n" not in str(error.value)

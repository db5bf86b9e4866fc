"""How often and how long a policy acts, told by one character for each step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.monitor.policies.policy_records import MEAN, acting_steps, series
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.small_gradients import LearningRateBoost


def acts(policy: BoundedPolicy, condition: str, key: str = "spell") -> str:
    """Where it acts, as ``#``.

    Of the condition, ``#`` begins a spell, ``-`` only keeps it going, and ``.`` ends it.
    """
    return "".join(".#"[policy.should_act(c == "#", c in "#-", key)] for c in condition)


@pytest.mark.parametrize(
    ("settings", "condition", "expected"),
    [
        ({}, "#.##.", "#.##."),
        ({"patience": 3}, "##.####.###", ".....##...#"),
        ({"patience": 3}, "##-##-###", "........#"),
        ({}, "--#--.--#", "..###...#"),
        ({"patience": 2}, "##--.##", ".###..#"),
    ],
)
def test_a_spell_begins_after_patience_and_lasts_while_the_weaker_condition_holds(
    settings: dict[str, int], condition: str, expected: str
) -> None:
    assert acts(BoundedPolicy(**settings), condition) == expected


@pytest.mark.parametrize(
    ("settings", "condition", "expected"),
    [
        ({"longest": 3, "cooldown": 2}, "##########", "###..###.."),
        ({"longest": 3, "cooldown": 1}, "########", "###.###."),
        ({"longest": 3, "cooldown": 2}, "#---------", "###......."),
        ({"longest": 3, "cooldown": 5}, "###.###.#", "###.###.#"),
        ({"longest": 2, "cooldown": 0}, "#######", "#######"),
        ({"longest": 2, "cooldown": 0, "patience": 2}, "#######", ".##.##."),
        ({"longest": 1, "cooldown": 2, "patience": 2}, "########", ".#...#.."),
        ({"longest": 2, "cooldown": 3}, "##...##", "##...##"),
        ({"longest": 2, "cooldown": 3}, "###...#", "##....#"),
    ],
)
def test_a_spell_of_the_longest_is_followed_by_a_rest_and_a_shorter_one_is_not(
    settings: dict[str, int], condition: str, expected: str
) -> None:
    assert acts(BoundedPolicy(**settings), condition) == expected


def test_the_steps_of_all_spells_together_are_at_most_the_most() -> None:
    assert acts(BoundedPolicy(most=4), "##.####.#") == "##.##...."
    assert acts(BoundedPolicy(most=5, longest=2, cooldown=1), "#########") == "##.##.#.."


def test_spells_of_several_keys_are_counted_apart() -> None:
    policy = BoundedPolicy(most=2)
    assert acts(policy, "###", "one") == "##."
    assert acts(policy, "###", "other") == "##."


def test_a_spell_is_taken_up_where_a_state_left_it() -> None:
    condition = "##-##############-###.######"
    whole = acts(BoundedPolicy(patience=2, longest=4, cooldown=3, most=11), condition)
    for k in range(len(condition)):
        before, after = (
            BoundedPolicy(patience=2, longest=4, cooldown=3, most=11) for _ in range(2)
        )
        start = acts(before, condition[:k])
        after.load_state_dict(before.state_dict())
        assert start + acts(after, condition[k:]) == whole


def test_by_default_a_policy_acts_200_steps_rests_20_and_acts_again() -> None:
    found = acting_steps(LearningRateBoost(), series(MEAN, [1e-4] * 250))
    assert found == [*range(1, 201), *range(221, 251)]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("patience", 0, "an integer of 1 or more"),
        ("patience", True, "an integer of 1 or more"),
        ("longest", 0, "an integer of 1 or more"),
        ("most", 0, "an integer of 1 or more"),
        ("most", 2.0, "an integer of 1 or more"),
        ("cooldown", -1, "an integer of 0 or more"),
        ("cooldown", "20", "an integer of 0 or more"),
        ("patience", None, "an integer of 1 or more"),
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(setting: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as error:
        BoundedPolicy(**{setting: value})
    message = str(error.value)
    assert message.startswith(f"policy BoundedPolicy: {setting} is {value!r}; expected {expected}")
    assert "\n" not in message
